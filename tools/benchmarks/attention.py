"""Speed of each attention backend, forward and backward, with ALiBi.

    python -m tools.benchmarks.attention [--json FILE]

TFLOP/s count what a causal model needs: half of the scores, two products forward and, as published
figures do, five backward, since a kernel that keeps no scores computes them again.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from megatron.cli import run_tool
from megatron.launch import Launch
from megatron.model.alibi import alibi_slopes
from megatron.model.attention import AttentionBias, Backend, attention, runs_on
from tools.benchmarks.measure import ROUNDS, Times, Work, check_quiet, interleave, timer_of
from tools.benchmarks.ranks import run_alone
from tools.benchmarks.result import (
    Result,
    Row,
    Table,
    add_timing_options,
    build_parser,
    describe_environment,
    publish,
)

_PRODUCTS = 2 + 5


@dataclass(frozen=True)
class Shape:
    """Of queries, keys and values."""

    batch: int
    heads: int
    seq: int
    head_size: int
    dtype: torch.dtype

    @property
    def flops(self) -> float:
        """Operations forward and backward."""
        product = 2 * self.batch * self.heads * self.seq**2 * self.head_size
        return _PRODUCTS * product / 2


CPU_SHAPES = [
    Shape(2, 8, 512, head_size, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for head_size in (64, 80, 96, 128)
]
GPU_SHAPES = [Shape(4, 32, 2048, head_size, torch.bfloat16) for head_size in (64, 80, 96, 128)]
QUICK = [Shape(1, 2, 64, 16, torch.float32)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    parser = build_parser("Speed of each attention backend.")
    add_timing_options(parser)
    args = parser.parse_args(argv)
    shapes = GPU_SHAPES if args.device == "cuda" else CPU_SHAPES
    if args.quick:
        shapes = QUICK
    rows: list[Row] = []
    for shape, times in zip(
        shapes, run_alone(time_shapes, shapes, device=args.device), strict=True
    ):
        what = f"attention with heads of {shape.head_size}"
        check_quiet(what, times, allow_noise=args.noisy or args.quick)
        rows += rows_of(shape, times)
    table = Table("Attention, forward and backward", rows)
    publish(Result("attention", describe_environment(args.device), [table]), args.json)
    return 0


def rows_of(shape: Shape, times: dict[str, Times]) -> Iterator[Row]:
    """One row for each backend."""
    for backend, found in times.items():
        yield {
            "b x n x s x d": f"{shape.batch} x {shape.heads} x {shape.seq} x {shape.head_size}",
            "dtype": str(shape.dtype).removeprefix("torch."),
            "backend": backend,
            "ms": found.least * 1000,
            "TFLOP/s": shape.flops / found.least / 1e12,
            "median / least": found.spread,
        }


def time_shapes(launch: Launch, shapes: Sequence[Shape]) -> list[dict[str, Times]]:
    """For each shape, the times of every backend that runs on the device."""
    return [_time_backends(launch.device, shape) for shape in shapes]


def _time_backends(device: torch.device, shape: Shape) -> dict[str, Times]:
    size = (shape.batch, shape.heads, shape.seq, shape.head_size)
    tensors = [torch.randn(size, dtype=shape.dtype, device=device) for _ in range(4)]
    backends: list[Backend] = [b for b in get_args(Backend) if runs_on(b, device)]
    works: dict[str, Work] = {backend: _pass(backend, *tensors) for backend in backends}
    able = {backend: work for backend, work in works.items() if _runs(backend, work)}
    return interleave(able, timer_of(device), rounds=ROUNDS)


def _runs(backend: str, work: Work) -> bool:
    """Whether ``work`` does not fail, as a compiler may that does not know the device."""
    try:
        work()
    except RuntimeError as error:
        print(f"{backend} is left out: {error}", file=sys.stderr)
        return False
    return True


def _pass(backend: Backend, query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> Work:
    query, key, value = (x.detach().clone().requires_grad_() for x in (query, key, value))
    bias = AttentionBias(slopes=alibi_slopes(query.size(1)).to(query.device))

    def forward_and_backward() -> None:
        out = attention(query, key, value, bias, backend=backend)
        torch.autograd.grad(out, (query, key, value), grad)

    return forward_and_backward


if __name__ == "__main__":
    run_tool(main)
