"""Find the fastest layout of a run on a cluster, by arithmetic.

    python -m tools.plan --config examples/configs/bloom-176b.yaml --cluster a100 --gpus 384

Prints a table of the best layouts, and how many did not fit; ``--plot`` draws them all. What the
predictions are made of stands in ``megatron/planning``. They rank layouts; before a long run, try
the first few of them for some steps.
"""

import argparse
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from megatron.atomic import atomic_write, make_folder
from megatron.cli import run_tool
from megatron.config import Config, load_config
from megatron.config.rules import require, require_multiple
from megatron.planning.cluster import CLUSTERS, GIB, Cluster
from megatron.planning.search import RESERVED, Candidate, Found, search
from mpu import ParallelDims
from tools.benchmarks.result import Row, Table, table_lines
from tools.report import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, STYLE

_COLORS = {"none": BLUE, "selective": GREEN, "full": ORANGE}
_LABELLED = 3
"""Rank grids whose best layout has its name in the plot."""


def main(argv: Sequence[str] | None = None) -> int:
    """Plan what the command line ``argv`` asks for; return the exit code."""
    args, options = _build_parser().parse_known_args(argv)
    for name in ("gpus", "gpus_per_node", "memory", "best"):
        value = getattr(args, name)
        require(
            value is None or 0 < value < math.inf,
            f"--{name} must be greater than 0 and finite, got {value}",
        )
    config = load_config(["--config", str(args.config), *options])
    cluster = _cluster(args)
    found = search(config, cluster)
    print("\n".join(_lines(config, cluster, found, args.best)))
    if args.plot is not None:
        _write_plot(draw(config, cluster, found), args.plot)
        print(f"\nwrote {args.plot}")
    return 0


def draw(config: Config, cluster: Cluster, found: Found) -> Figure:
    """Every layout that fits: seconds of a step over the memory of its fullest rank."""
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
        figure = Figure(figsize=(10, 6), layout=layout)
        axes = figure.subplots()
        axes.set_title(
            f"Predicted seconds of a step on {cluster.gpus} GPUs, "
            "the best with tensor x pipeline x data"
        )
        for recompute, color in _COLORS.items():
            alike = [c for c in found.candidates if c.config.train.recompute == recompute]
            _scatter(axes, alike, label=f"recompute {recompute}", color=color, s=16, alpha=0.7)
        own = [c for c in found.candidates if c.is_layout_of(config)]
        _scatter(axes, own, label="the config's own", color=PURPLE, marker="*", s=180, zorder=4)
        for place, candidate in enumerate(_best_grids(found, _LABELLED), start=1):
            _label(axes, candidate, below=12 + 14 * place)
        axes.set_xlabel("GiB of the fullest rank")
        # Room for the names of the best.
        axes.set_ylim(bottom=0.72 * found.candidates[0].time.total)
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def _scatter(axes: Axes, candidates: Sequence[Candidate], **options: Any) -> None:
    if candidates:
        axes.scatter(*zip(*map(_point, candidates), strict=True), **options)


def _point(candidate: Candidate) -> tuple[float, float]:
    return (candidate.memory.total + RESERVED) / GIB, candidate.time.total


def _label(axes: Axes, candidate: Candidate, below: int) -> None:
    """Write its rank grid as many points below a candidate."""
    dims = candidate.dims
    text = f"{dims.tensor} x {dims.pipeline} x {dims.data}"
    axes.annotate(
        text,
        _point(candidate),
        xytext=(0, -below),
        textcoords="offset points",
        ha="center",
        color=INK,
        arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.8},
    )


def _best_grids(found: Found, count: int) -> list[Candidate]:
    """The best layouts of ``count`` different rank grids."""
    best: dict[ParallelDims, Candidate] = {}
    for candidate in found.candidates:
        best.setdefault(candidate.dims, candidate)
    return list(best.values())[:count]


def _lines(config: Config, cluster: Cluster, found: Found, best: int) -> Iterator[str]:
    """What is printed."""
    yield (
        f"{len(found.candidates):,} layouts fit in {cluster.memory / GIB:.4g} GiB, "
        f"{found.num_too_large:,} do not. The best, by predicted time:"
    )
    rows = [_row(place, candidate) for place, candidate in enumerate(found.candidates, start=1)]
    yield ""
    yield from table_lines(Table("", rows[:best]))
    own = [row for row, c in zip(rows, found.candidates, strict=True) if c.is_layout_of(config)]
    if own:
        yield "\nThe config's own:\n"
        yield from table_lines(Table("", own))


def _row(place: int, candidate: Candidate) -> Row:
    dims, time = candidate.dims, candidate.time
    parallel, train = candidate.config.parallel, candidate.config.train
    chunks = f" x {parallel.chunks}" if parallel.chunks > 1 else ""
    return {
        "": place,
        "tensor": dims.tensor,
        "pipeline": dims.pipeline,
        "data": dims.data,
        "micro-batch": train.micro_batch_size,
        "ZeRO": parallel.zero,
        "sequence": "yes" if parallel.sequence else "no",
        "recompute": train.recompute,
        "schedule": f"{parallel.schedule}{chunks}" if dims.pipeline > 1 else "-",
        "GiB": f"{_point(candidate)[0]:.1f}",
        "s a step": f"{time.total:.4g}",
        "tokens/s/GPU": f"{candidate.tokens_per_second:,.0f}",
        "bubble": f"{time.bubble_share:.1%}",
    }


def _cluster(args: argparse.Namespace) -> Cluster:
    """The cluster that is asked for, with what is known of the named one."""
    named = CLUSTERS[args.cluster]
    memory = named.memory if args.memory is None else args.memory * GIB
    per_node = min(args.gpus, args.gpus_per_node)
    require_multiple("--gpus", args.gpus, "--gpus_per_node", per_node)
    return replace(named, gpus=args.gpus, gpus_per_node=per_node, memory=memory)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan",
        description="Find the fastest layout of a run on a cluster.",
        epilog="Other options, such as --train.global_batch_size 512, are those of the config.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--gpus", type=int, required=True, help="how many there are")
    parser.add_argument(
        "--cluster", choices=sorted(CLUSTERS), default="a100", help="kind of nodes; default: a100"
    )
    parser.add_argument("--gpus_per_node", type=int, default=8, help="default: 8")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a GPU, if other than usual")
    parser.add_argument("--best", type=int, default=10, help="layouts to print; default: 10")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw all layouts, as PNG")
    return parser


def _write_plot(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    make_folder(path.parent)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


if __name__ == "__main__":
    run_tool(main)
