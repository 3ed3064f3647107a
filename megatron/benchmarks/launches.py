"""How far a CPU is ahead of the GPU that it gives work to: what a CUDA graph could win.

    python -m megatron.benchmarks.launches [--json FILE]

Launching operations one by one costs nothing as long as the CPU issues them faster than the GPU
works on them. Both are compared for a microbatch of 2048-token sequences, forward and backward:

    CPU    for each operation, what this one takes to issue it, and 2.5 us to launch it
    GPU    what the products of the model take at half of an H200's 989.5 TFLOP/s

Operations are counted on meta tensors where torch dispatches them, without views and without those
that only reserve memory. The time to issue one is that of a model as deep, but so small that the
CPU computes it in no time; meta tensors are no use for that, since what they do instead of
computing is written in Python. Nothing is compiled and the scores of attention are explicit, which
makes more operations than a GPU is given: the CPU's time is an upper bound.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.benchmarks.flops import BLOOM
from megatron.benchmarks.measure import Work, cpu_seconds, interleave
from megatron.benchmarks.program import Run, run_benchmark
from megatron.benchmarks.result import GIB
from megatron.cli import run_tool
from megatron.config import ModelConfig
from megatron.launch import Launch
from megatron.model.flops import flops_per_token
from megatron.model.inputs import ModelInputs
from megatron.model.language_model import BloomForPretraining
from megatron.model.placement import Placement
from megatron.report.tables import Row, Table
from mpu import set_main_grad

LAUNCH_SECONDS = 2.5e-6
"""Time that the driver takes for one launch."""

GPU_FLOPS = 0.5 * 989.5e12
_GPU_BYTES = 139 * GIB

_RESERVE = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view")
"""Operations that launch nothing, besides views."""

MODELS = ("560m", "1b1", "1b7", "3b")
MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Issue:
    """What the CPU has to do for a microbatch, forward and backward.

    Attributes:
        operations: of the whole model.
        in_a_layer: of these, those of one layer.
        seconds_each: to issue one.
    """

    operations: int
    in_a_layer: int
    seconds_each: float

    @property
    def seconds(self) -> float:
        """To issue and to launch them all."""
        return self.operations * (self.seconds_each + LAUNCH_SECONDS)


class OperationCount(TorchDispatchMode):
    """Counts, while entered, the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not (func.is_view or func.overloadpacket.__name__ in _RESERVE)
        return func(*args, **(kwargs or {}))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    description = "Time to issue a microbatch, and time to compute it."
    return run_benchmark("launches", description, measure, argv, timed=False)


def measure(run: Run) -> Iterator[Table]:
    """The table of all models and sizes of the microbatch."""
    rows: list[Row] = []
    for name in MODELS[:1] if run.quick else MODELS:
        for micro_batch in MICRO_BATCHES[:1] if run.quick else MICRO_BATCHES:
            issue = run.alone(issue_microbatch, BLOOM[name], micro_batch)
            rows.append(row_of(name, micro_batch, issue))
    yield Table("A microbatch: the CPU that issues it, and the GPU that computes it", rows)
    yield Table("The smallest microbatch at which the CPU is ahead", list(smallest_ahead(rows)))


def row_of(name: str, micro_batch: int, issue: Issue) -> Row:
    """The row of one model and size of the microbatch."""
    config = BLOOM[name]
    flops = flops_per_token(config, "causal") * micro_batch * config.seq_length
    seconds = flops / GPU_FLOPS
    return {
        "model": name,
        "micro-batch": micro_batch,
        "operations of a layer": issue.in_a_layer,
        "of the model": issue.operations,
        "us to issue one": issue.seconds_each * 1e6,
        "CPU ms": issue.seconds * 1000,
        "GPU ms": seconds * 1000,
        "GPU / CPU": seconds / issue.seconds,
    }


def smallest_ahead(rows: Sequence[Row]) -> Iterator[Row]:
    """For each model, the first of its sizes at which the GPU takes longer than the CPU."""
    for name in dict.fromkeys(row["model"] for row in rows):
        sizes = [
            row["micro-batch"]
            for row in rows
            if row["model"] == name and float(str(row["GPU / CPU"])) > 1
        ]
        yield {"model": name, "micro-batch": sizes[0] if sizes else "none of these"}


def issue_microbatch(launch: Launch, config: ModelConfig, micro_batch: int) -> Issue:
    """Count the operations of one microbatch, and time those of a tiny model."""
    shorter = replace(config, num_layers=config.num_layers - 1)
    meta = torch.device("meta")
    # The head takes as many tokens at once as it would on the GPU.
    with mock.patch("mpu.cross_entropy._gpu_memory", return_value=float(_GPU_BYTES)):
        operations, without_one = (
            _count(_microbatch(launch, model, micro_batch, meta)) for model in (config, shorter)
        )
    small = replace(config, hidden_size=16, num_heads=2, vocab_size=64, seq_length=8)
    tiny = _microbatch(launch, small, micro_batch, launch.device)
    times = interleave({"tiny": tiny}, cpu_seconds)
    return Issue(operations, operations - without_one, times["tiny"].least / _count(tiny))


def _microbatch(
    launch: Launch, config: ModelConfig, micro_batch: int, device: torch.device
) -> Work:
    """Forward and backward of a model on ``device``; in bf16, or on a CPU in fp32."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with device:
        model = BloomForPretraining(
            config, Placement(launch.groups.tensor, dtype=dtype), backend="explicit"
        )
        tokens = torch.zeros(micro_batch, config.seq_length, dtype=torch.int64)
        inputs = ModelInputs(tokens, tokens, torch.ones(tokens.shape), torch.zeros(micro_batch))
    for parameter in model.parameters():
        set_main_grad(parameter, torch.zeros_like(parameter, dtype=torch.float32))
    return lambda: model(inputs).backward()


def _count(work: Work) -> int:
    with OperationCount() as operations:
        work()
    return operations.count


if __name__ == "__main__":
    run_tool(main)
