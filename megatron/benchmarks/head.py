"""Time and memory of the output layer and its loss, forward and backward, at BLOOM's vocabulary.

    python -m megatron.benchmarks.head [--json FILE]

    fused     mpu.vocab_parallel_linear_cross_entropy
    plain     F.cross_entropy of all logits
    torch     F.linear_cross_entropy with its options for chunks; from torch 2.13 on
    products  nothing but the three matrix products, which no head can do without: the floor

The memory is what is needed at once beside hidden states and weights, gradients included.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.benchmarks.measure import ROUNDS, Times, Work, interleave, peak_bytes, timer_of
from megatron.benchmarks.program import Run, run_benchmark
from megatron.benchmarks.result import MIB
from megatron.cli import run_tool
from megatron.launch import Launch
from megatron.report.tables import Row, Table
from mpu import vocab_parallel_linear_cross_entropy


@dataclass(frozen=True)
class Shape:
    """Of the head."""

    tokens: int
    hidden: int
    vocab: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.tokens} tokens, hidden {self.hidden}, vocabulary {self.vocab}"


# Torch's own head takes ten times as long as the others on a CPU: few tokens, for all of them.
CPU = Shape(tokens=128, hidden=256, vocab=250_880, dtype=torch.float32)
CPU_MEMORY = replace(CPU, tokens=1024)
GPU = Shape(tokens=16_384, hidden=2048, vocab=250_880, dtype=torch.bfloat16)
QUICK = Shape(tokens=64, hidden=16, vocab=512, dtype=torch.float32)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    description = "Time and memory of the output layer and its loss."
    return run_benchmark("head", description, measure, argv)


def measure(run: Run) -> Iterator[Table]:
    """A table of times, and one of memory."""
    shape = run.choose(quick=QUICK, cpu=CPU, cuda=GPU)
    times = run.timed("head", time_heads, shape)
    yield Table(f"Time of the head, {shape}", list(time_rows(times)))
    larger = run.choose(quick=QUICK, cpu=CPU_MEMORY, cuda=GPU)
    memory = {name: run.alone(measure_memory, larger, name) for name in times}
    yield Table(f"Memory of the head, {larger}", list(memory_rows(memory)))


def memory_rows(memory: dict[str, int]) -> Iterator[Row]:
    """One row for each contender."""
    for name, num_bytes in memory.items():
        yield {
            "contender": name,
            "peak MiB": num_bytes / MIB,
            "share of plain": num_bytes / memory["plain"],
        }


def time_rows(times: dict[str, Times]) -> Iterator[Row]:
    """One row for each contender."""
    floor = times["products"].least
    for name, found in times.items():
        yield {
            "contender": name,
            "ms": found.least * 1000,
            "times the floor": found.least / floor,
            "median / least": found.spread,
        }


def time_heads(launch: Launch, shape: Shape) -> dict[str, Times]:
    """Times of all contenders."""
    return interleave(contenders(launch, shape), timer_of(launch.device), rounds=ROUNDS)


def measure_memory(launch: Launch, shape: Shape, name: str) -> int:
    """Peak bytes of one contender."""
    # What the libraries allocate once belongs to no contender.
    contenders(launch, QUICK)[name]()
    return peak_bytes(contenders(launch, shape)[name], launch.device)


def contenders(launch: Launch, shape: Shape) -> dict[str, Work]:
    """Forward and backward pass of each, on the same numbers."""
    with launch.device:
        hidden = torch.randn(shape.tokens, shape.hidden, dtype=shape.dtype).requires_grad_()
        weight = torch.empty(shape.vocab, shape.hidden, dtype=shape.dtype).normal_(std=0.02)
        weight.requires_grad_()
        targets = torch.randint(shape.vocab, (shape.tokens,))
        means = torch.full((shape.tokens,), 1 / shape.tokens)

    def fused() -> Tensor:
        return vocab_parallel_linear_cross_entropy(
            hidden, weight, targets, means, group=launch.groups.tensor
        )

    def plain() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    def chunked() -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, targets, options=options)

    losses = {"fused": fused, "plain": plain}
    if hasattr(F, "linear_cross_entropy"):
        losses["torch"] = chunked
    works: dict[str, Work] = {
        name: _forward_and_backward(loss, hidden, weight) for name, loss in losses.items()
    }
    return {**works, "products": lambda: _products(hidden, weight)}


def _forward_and_backward(loss: Callable[[], Tensor], hidden: Tensor, weight: Tensor) -> Work:
    return lambda: torch.autograd.grad(loss(), (hidden, weight))


@torch.no_grad()
def _products(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T
    return logits @ weight, logits.T @ hidden


if __name__ == "__main__":
    run_tool(main)
