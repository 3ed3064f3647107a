"""Continue texts with a checkpoint.

    python tools/generate.py --checkpoint runs/bloom --prompt "Once upon a time" --greedy
    torchrun --nproc_per_node 2 tools/generate.py --checkpoint runs/bloom --prompts prompts.txt

The ranks share each layer, however many saved the checkpoint. It computes in the precision that the
run computed in, on GPUs where they are. The same seed gives the same texts at any number of ranks,
up to rounding. An empty prompt begins a document.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.checkpoint.load import open_checkpoint
from megatron.cli import RanksParser, run_tool
from megatron.config import LaunchConfig
from megatron.errors import DataError
from megatron.inference.generation import Sampling, generate
from megatron.inference.load import find_checkpoint, load_model, saved_config, saved_tokenizer
from megatron.launch import Launch, launched, read_environment
from megatron.plain import read_file
from megatron.together import run_everywhere, run_on_first
from mpu import ParallelDims


def continuations(
    checkpoint: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    launch: Launch,
) -> Iterator[str]:
    """Each of ``prompts`` with its continuation, up to the end of the document.

    Collective over all ranks, which are one tensor group.

    Raises:
        CheckpointError: if there is no checkpoint, or it is damaged.
        DataError: if it holds no tokenizer.
        ConfigError: if its model does not divide by the number of ranks.
    """
    group = launch.groups.tensor
    path = run_on_first(lambda: find_checkpoint(checkpoint), group)
    reader = open_checkpoint(path, group=group)
    config = saved_config(reader, tensor=group.size())
    tokenizer = run_everywhere(lambda: saved_tokenizer(reader), group)
    if tokenizer is None:
        raise DataError(f"{reader.path}: holds no tokenizer; the run had no data.tokenizer")
    model = load_model(
        reader, config.model, group, dtype=config.train.torch_dtype, device=launch.device
    )
    eod_id = tokenizer.eod_id
    for prompt in prompts:
        tokens = tokenizer.encode(prompt)
        new = generate(
            model,
            tokens or [eod_id],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            eod_id=eod_id,
        )
        yield tokenizer.decode([*tokens, *(token for token in new if token != eod_id)])


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        return read_file(path).decode().splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = RanksParser(description="Continue texts with a checkpoint.")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="a step-NNNNNNNN folder, or a run folder, whose newest checkpoint is taken",
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    prompts.add_argument("--prompts", type=Path, help="file with one prompt a line")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="default: 64")
    parser.add_argument("--greedy", action="store_true", help="take the most probable token")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1.0")
    parser.add_argument("--top_k", type=int, help="draw from so many tokens (default: all)")
    parser.add_argument("--top_p", type=float, default=1.0, help="default: 1.0")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool."""
    args = build_parser().parse_args(argv)
    sampling = Sampling(
        greedy=args.greedy, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p
    )
    prompts = args.prompt if args.prompts is None else read_prompts(args.prompts)
    environment = read_environment()
    with launched(lambda size: ParallelDims(tensor=size), LaunchConfig(), environment) as launch:
        for text in continuations(
            args.checkpoint,
            prompts,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
            seed=args.seed,
            launch=launch,
        ):
            if launch.rank == 0:
                print(text, flush=True)
    return 0


if __name__ == "__main__":
    run_tool(main)
