"""Speed of each attention backend, forward and backward, with ALiBi.

    python -m megatron.benchmarks.attention [--json FILE]

TFLOP/s count what a causal model needs: half of the scores, two products forward and, as published
figures do, five backward, since a kernel that keeps no scores computes them again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from megatron.benchmarks.measure import ROUNDS, Times, Work, interleave, runnable, timer_of
from megatron.benchmarks.program import Run, run_benchmark
from megatron.cli import run_tool
from megatron.launch import Launch
from megatron.model.alibi import alibi_slopes
from megatron.model.attention import AttentionBias, Backend, attention, runs_on
from megatron.report.tables import Row, Table

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
    return run_benchmark("attention", "Speed of each attention backend.", measure, argv)


def measure(run: Run) -> Iterator[Table]:
    """The table of all shapes of the device."""
    shapes = run.choose(quick=QUICK, cpu=CPU_SHAPES, cuda=GPU_SHAPES)
    rows: list[Row] = []
    for shape, times in zip(shapes, run.alone(time_shapes, shapes), strict=True):
        run.check(f"attention with heads of {shape.head_size}", times)
        rows += rows_of(shape, times)
    yield Table("Attention, forward and backward", rows)


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
    return interleave(runnable(works), timer_of(device), rounds=ROUNDS)


def _pass(backend: Backend, query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> Work:
    query, key, value = (x.detach().clone().requires_grad_() for x in (query, key, value))
    bias = AttentionBias(slopes=alibi_slopes(query.size(1)).to(query.device))

    def forward_and_backward() -> None:
        out = attention(query, key, value, bias, backend=backend)
        torch.autograd.grad(out, (query, key, value), grad)

    return forward_and_backward


if __name__ == "__main__":
    run_tool(main)
