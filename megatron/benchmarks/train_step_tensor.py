"""A training step on two tensor ranks of one thread each, against one process of two threads.

    python -m megatron.benchmarks.train_step_tensor [--json FILE]

Both have the same cores, so the ratio of their speeds is what tensor parallelism costs or gains
where it is not needed. They take turns, and it is the clock on the wall that counts, since ranks
wait for each other: the machine has to be idle. What a rank sends is counted too, and stands beside
the least that theory allows: for each layer two reductions forward and two backward, one more after
the embedding and one before the head.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.benchmarks.communication import Communication
from megatron.benchmarks.contenders import Shape, build_engine, draw_tokens, engine_step
from megatron.benchmarks.measure import ROUNDS, Times, check_quiet, interleave, wall_seconds
from megatron.benchmarks.program import build_parser
from megatron.benchmarks.ranks import build_alone, run_ranks
from megatron.benchmarks.result import MIB, Result, describe_environment, publish
from megatron.benchmarks.train_step import QUICK, SHAPES
from megatron.cli import run_tool
from megatron.config import dtype_named
from megatron.errors import RunError
from megatron.launch import Launch
from megatron.report.tables import Row, Table
from mpu import ParallelDims

TENSOR = 2

_TOLERANCE = 1e-2
"""Relative difference of the losses: in bf16 the ranks round parts of sums."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    parser = build_parser("Two tensor ranks against one process with as many threads.")
    parser.add_argument("--noisy", action="store_true", help="accept times that vary")
    args = parser.parse_args(argv)
    shapes = [replace(SHAPES["wide"], dtype="fp32"), SHAPES["wide"]]
    if args.quick:
        shapes = list(QUICK.values())
    rows = []
    for shape in shapes:
        times, sent = run_ranks(
            ParallelDims(tensor=TENSOR), time_layouts, shape, 2 if args.quick else ROUNDS
        )[0]
        what = f"{shape.dtype} step on {TENSOR} ranks"
        check_quiet(what, times, allow_noise=args.noisy or args.quick)
        rows.append(row_of(shape, times, sent))
    environment = describe_environment("cpu", threads="1 of each rank, 2 of the one process")
    table = Table("Two tensor ranks and one process on two cores", rows)
    publish(Result("train_step_tensor", environment, [table]), args.json)
    return 0


def row_of(shape: Shape, times: dict[str, Times], sent: float) -> Row:
    """The row of one shape; the ratio is that of tokens a second."""
    ranks, process = times["ranks"], times["process"]
    return {
        "dtype": shape.dtype,
        "hidden x layers": f"{shape.model.hidden_size} x {shape.model.num_layers}",
        "2 ranks, s": ranks.least,
        "1 process, s": process.least,
        "speed ratio": process.least / ranks.least,
        "median / least": max(ranks.spread, process.spread),
        "MiB a rank sends": sent / MIB,
        "MiB in theory": least_bytes(shape) / MIB,
    }


def least_bytes(shape: Shape) -> float:
    """Bytes that a rank has to send in one step."""
    reductions = 4 * shape.model.num_layers + 2
    num_bytes = shape.tokens * shape.model.hidden_size * dtype_named(shape.dtype).itemsize
    return reductions * num_bytes * 2 * (TENSOR - 1) / TENSOR


def time_layouts(launch: Launch, shape: Shape, rounds: int) -> tuple[dict[str, Times], float]:
    """Times of the two, and the bytes that this rank sends in a step."""
    tokens = draw_tokens(shape, launch.device)
    together = engine_step(build_engine(shape, launch.groups, launch.device))
    with Communication() as communication:
        loss = together(tokens)
    alone = _alone(launch, shape, tokens, loss)

    def ranks() -> None:
        together(tokens)
        dist.barrier()

    def process() -> None:
        alone()
        dist.barrier()

    times = interleave({"ranks": ranks, "process": process}, wall_seconds, rounds=rounds)
    return times, communication.bytes_sent(TENSOR)


def _alone(launch: Launch, shape: Shape, tokens: Tensor, want: float) -> Callable[[], None]:
    """The step of one process, on the first rank; the other one stands by.

    Raises:
        RunError: if it does not find the loss ``want``.
    """
    groups = build_alone()
    if launch.rank > 0:
        return lambda: None
    step = engine_step(build_engine(shape, groups, launch.device))
    if abs(step(tokens) - want) > _TOLERANCE * want:
        raise RunError(f"{TENSOR} ranks find another loss than one process, {want}")

    def with_all_threads() -> None:
        torch.set_num_threads(TENSOR)
        step(tokens)
        torch.set_num_threads(1)

    return with_all_threads


if __name__ == "__main__":
    run_tool(main)
