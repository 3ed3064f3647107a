"""``bloom generate``: continue texts with a save.

    bloom generate runs/bloom --prompt "Once upon a time" --greedy
    torchrun --nproc_per_node 2 --no_python bloom generate runs/bloom --prompts prompts.txt

The ranks share each layer, however many saved the checkpoint. It computes in the precision that the
run computed in, on GPUs where they are. The same seed gives the same texts at any number of ranks,
up to rounding. An empty prompt begins a document.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron.commands.arguments import CommandParser, add_run, run_of


def main(argv: Sequence[str]) -> int:
    """Print each prompt with its continuation; return the exit code."""
    args = _build_parser().parse(argv)
    from megatron.config import LaunchConfig
    from megatron.inference.continuations import continuations, read_prompts
    from megatron.inference.generation import Sampling
    from megatron.launch import launched, read_environment
    from mpu import ParallelDims

    sampling = Sampling(
        greedy=args.greedy, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p
    )
    prompts = args.prompt if args.prompts is None else read_prompts(args.prompts)
    environment = read_environment()
    with launched(lambda size: ParallelDims(tensor=size), LaunchConfig(), environment) as launch:
        for text in continuations(
            run_of(args),
            prompts,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
            seed=args.seed,
            launch=launch,
        ):
            if launch.rank == 0:
                print(text, flush=True)
    return 0


def _build_parser() -> CommandParser:
    parser = CommandParser(
        "generate",
        "Continue texts with a save.",
        [
            'bloom generate runs/mine --prompt "Once upon a time" --temperature 0.7 --top_k 40',
            "torchrun --nproc_per_node 2 --no_python bloom generate runs/mine --prompts lines.txt",
        ],
    )
    add_run(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    prompts.add_argument("--prompts", type=Path, help="file with one prompt a line")
    parser.add_argument(
        "--max_new_tokens", type=int, default=64, help="tokens to add at most (default: 64)"
    )
    parser.add_argument("--greedy", action="store_true", help="take the most probable token")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="below 1 the probable tokens become more so; for none at all use --greedy "
        "(default: 1.0)",
    )
    parser.add_argument(
        "--top_k", type=int, help="draw from so many of the most probable tokens (default: all)"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="draw from the most probable tokens that have this probability together (default: "
        "1.0, all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    return parser
