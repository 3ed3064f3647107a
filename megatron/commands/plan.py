"""``bloom plan``: find the fastest layout of a run on a cluster, by arithmetic.

    bloom plan --config bloom-176b --cluster a100 --gpus 384

Prints a table of the best layouts, how many did not fit, how long the run takes on the best, and
the options that give it; ``--plot`` draws them all. What the predictions are made of stands in
``megatron/planning``. They rank layouts; before a long run, try the first few for some steps.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from megatron.commands.arguments import CommandParser, add_overwrite, check_output
from megatron.config import load_config
from megatron.config.rules import require
from megatron.planning.cluster import CLUSTERS, GIB, cluster_of


def main(argv: Sequence[str]) -> int:
    """Plan what the command line ``argv`` asks for; return the exit code."""
    args, options = _build_parser().parse_some(argv)
    for name in ("gpus", "gpus_per_node", "memory", "best"):
        value = getattr(args, name)
        require(
            value is None or 0 < value < math.inf,
            f"--{name} must be greater than 0 and finite, got {value}",
        )
    if args.plot is not None:
        check_output(args, "--plot", [args.plot])
    config = load_config(["--config", args.config, *options])
    memory = None if args.memory is None else args.memory * GIB
    cluster = cluster_of(args.cluster, args.gpus, args.gpus_per_node, memory)
    from megatron.planning.search import search
    from megatron.report.layouts import layout_lines, write_plot

    found = search(config, cluster)
    print("\n".join(layout_lines(config, cluster, found, args.best)))
    if args.plot is not None:
        write_plot(config, cluster, found, args.plot)
        print(f"\nwrote {args.plot}")
    return 0


def _build_parser() -> CommandParser:
    parser = CommandParser(
        "plan",
        "Find the fastest layout of a run on a cluster. Other options, such as "
        "--train.global_batch_size 512,\nare those of the config: bloom train --help.",
        [
            "bloom plan --config bloom-7b1 --cluster h100 --gpus 8",
            "bloom plan --config run.yaml --gpus 384 --best 3 --plot layouts.png",
        ],
    )
    parser.add_argument(
        "--config", required=True, help="YAML file of the run, or a name as bloom-7b1"
    )
    parser.add_argument("--gpus", type=int, required=True, help="how many there are")
    parser.add_argument(
        "--cluster", choices=sorted(CLUSTERS), default="a100", help="kind of nodes; default: a100"
    )
    parser.add_argument(
        "--gpus_per_node", type=int, default=8, help="GPUs of one node (default: 8)"
    )
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a GPU, if other than usual")
    parser.add_argument("--best", type=int, default=10, help="layouts to print; default: 10")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw all layouts, as PNG")
    add_overwrite(parser)
    return parser
