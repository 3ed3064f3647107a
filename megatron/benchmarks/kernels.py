"""Speed of FusedScaleMaskSoftmax, forward and backward, as a Triton kernel and in torch.

    python -m megatron.benchmarks.kernels [--json FILE]

GB/s count what no softmax can do without: forward the scores are read and the probabilities
written, backward probabilities and gradient are read and a gradient is written. Where Triton does
not run, as on a CPU, torch's way stands alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.benchmarks.measure import ROUNDS, Times, Work, interleave, timer_of
from megatron.benchmarks.program import Run, run_benchmark
from megatron.cli import run_tool
from megatron.launch import Launch
from megatron.model.alibi import alibi_slopes
from megatron.model.fused_softmax import scale_mask_softmax
from megatron.model.softmax_kernels import fused_scale_mask_softmax, is_available
from megatron.report.tables import Row, Table

_PASSES_OVER_SCORES = 2 + 3


@dataclass(frozen=True)
class Shape:
    """Of the scores."""

    batch: int
    heads: int
    seq: int
    dtype: torch.dtype

    @property
    def score_bytes(self) -> int:
        return self.batch * self.heads * self.seq**2 * self.dtype.itemsize


CPU_SHAPES = [Shape(2, 8, 512, dtype) for dtype in (torch.float32, torch.bfloat16)]
GPU_SHAPES = [
    Shape(4, 32, seq, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for seq in (1024, 2048, 4096)
]
QUICK = [Shape(1, 2, 64, torch.float32)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    return run_benchmark("kernels", "Speed of the softmax of attention.", measure, argv)


def measure(run: Run) -> Iterator[Table]:
    """The table of all shapes of the device."""
    rows: list[Row] = []
    for shape in run.choose(quick=QUICK, cpu=CPU_SHAPES, cuda=GPU_SHAPES):
        rows += rows_of(shape, run.timed("softmax", time_softmax, shape))
    yield Table("Scale, ALiBi, mask and softmax, forward and backward", rows)


def rows_of(shape: Shape, times: dict[str, Times]) -> Iterator[Row]:
    """One row for each way."""
    for name, found in times.items():
        yield {
            "b x n x s": f"{shape.batch} x {shape.heads} x {shape.seq}",
            "dtype": str(shape.dtype).removeprefix("torch."),
            "by": name,
            "ms": found.least * 1000,
            "GB/s": _PASSES_OVER_SCORES * shape.score_bytes / found.least / 1e9,
            "median / least": found.spread,
        }


def time_softmax(launch: Launch, shape: Shape) -> dict[str, Times]:
    """Times of every way that works on the device."""
    device = launch.device
    size = (shape.batch, shape.heads, shape.seq, shape.seq)
    scores, grad = (torch.randn(size, dtype=shape.dtype, device=device) for _ in range(2))
    slopes = alibi_slopes(shape.heads).to(device)
    works = {"torch": _pass(scale_mask_softmax, scores, slopes, grad)}
    if is_available(device):
        works["Triton"] = _pass(fused_scale_mask_softmax, scores, slopes, grad)
    return interleave(works, timer_of(device), rounds=ROUNDS)


def _pass(softmax: Callable[..., Tensor], scores: Tensor, slopes: Tensor, grad: Tensor) -> Work:
    leaf = scores.detach().clone().requires_grad_()

    def forward_and_backward() -> None:
        torch.autograd.grad(softmax(leaf, 0.125, None, slopes, 0), leaf, grad)

    return forward_and_backward


if __name__ == "__main__":
    run_tool(main)
