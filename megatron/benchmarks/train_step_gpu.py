"""Speed of training BLOOM on one GPU, beside other programs, and where the time of a step goes.

    python -m megatron.benchmarks.train_step_gpu [--models 1b7 3b] [--json FILE]

Sequences of 2048 tokens in bf16 with float32 weights, nothing recomputed, each with the largest
micro-batch that fits. The time of a step is the median of 20 after 5 that do not count. Utilisation
is that of the data sheet's peak, with the scores that a causal mask leaves and with all of them;
published figures use either. ``--quick`` runs a tiny model, on a CPU too.
"""

import gc
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from megatron.benchmarks.contenders import (
    Contender,
    Shape,
    Step,
    build_step,
    contenders_for,
    draw_tokens,
)
from megatron.benchmarks.flops import BLOOM
from megatron.benchmarks.measure import Times, Work, gpu_seconds, wall_seconds
from megatron.benchmarks.program import build_parser
from megatron.benchmarks.ranks import Device, run_alone
from megatron.benchmarks.result import GIB, Result, describe_environment, publish
from megatron.benchmarks.train_step import QUICK
from megatron.cli import run_tool
from megatron.config import ModelConfig
from megatron.errors import ConfigError, RunError
from megatron.launch import Launch
from megatron.model.flops import flops_per_token, peak_flops
from megatron.report.tables import Row, Table

MOST_SEQUENCES = 32
WARM_UP, STEPS = 5, 20

_TYPICAL_MICRO_BATCH = 8
"""With which attention backends are compared, before it is known what fits."""

_USABLE = 0.92
"""Share of the memory that tensors can fill; the rest goes to libraries and gaps."""

# Kinds of kernels by their names; the first that matches counts.
_KINDS = (
    ("attention", r"flash|fmha|attention|sdpa|triton_tem"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|splitK|addmm|mm$|linear"),
    ("softmax and loss", r"softmax|nll|cross_entropy"),
    ("layer norm", r"layer_?norm"),
    ("optimizer", r"multi_tensor|adam"),
    ("copies", r"memcpy|memset|copy|cat"),
    ("reductions", r"reduce|norm|triton_(red|per)"),
    ("element-wise", r"elementwise|vectorized|triton_poi"),
)


@dataclass(frozen=True)
class Measurement:
    """What one contender reached with one model.

    Attributes:
        peak_bytes: memory at its peak; 0 on a CPU.
        kernels: seconds of one step, by kind of kernel.
    """

    micro_batch: int
    times: Times
    peak_bytes: int
    kernels: Mapping[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    parser = build_parser("Speed of training BLOOM on one GPU.")
    parser.add_argument("--models", nargs="+", choices=BLOOM, default=["1b7", "3b"])
    args = parser.parse_args(argv)
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.quick:
        raise ConfigError("train_step_gpu needs a GPU, and torch finds none; --quick does without")
    peak = None
    if device == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(), torch.bfloat16)
    models = {name: BLOOM[name] for name in args.models}
    if args.quick:
        models = {name: shape.model for name, shape in QUICK.items()}
    # The plain model shows what torch gives, which the CPU can tell as well.
    contenders = [name for name in contenders_for("bf16", torch.device(device)) if name != "plain"]
    rows: list[Row] = []
    profiles: list[Row] = []
    for name, model in models.items():
        for contender in contenders:
            found: Measurement = run_alone(measure, contender, model, device=device)
            rows.append(row_of(name, contender, model, found, peak))
            profiles += profile_rows(name, contender, found)
        # A later model that fails takes nothing from the earlier ones.
        tables = [Table("Training step", rows), Table("Kernels of one step", profiles)]
        publish(Result("train_step_gpu", describe_environment(device), tables), args.json)
    return 0


def row_of(
    name: str, contender: Contender, model: ModelConfig, found: Measurement, peak: float | None
) -> Row:
    """The row of one measurement, on a device of ``peak`` FLOP/s, if these are known."""
    tokens_per_second = found.micro_batch * model.seq_length / found.times.median
    causal, full = (
        peak and f"{tokens_per_second * flops_per_token(model, attention) / peak:.1%}"
        for attention in ("causal", "full")
    )
    return {
        "model": name,
        "contender": contender,
        "micro-batch": found.micro_batch,
        "s a step": found.times.median,
        "median / least": found.times.spread,
        "tokens/s": tokens_per_second,
        "MFU causal": causal,
        "MFU full": full,
        "peak GiB": found.peak_bytes / GIB,
    }


def profile_rows(name: str, contender: Contender, found: Measurement) -> list[Row]:
    """One row for each kind of kernel, the longest first."""
    total = sum(found.kernels.values())
    return [
        {
            "model": name,
            "contender": contender,
            "kernels": kind,
            "ms": seconds * 1000,
            "share": f"{seconds / total:.1%}",
        }
        for kind, seconds in sorted(found.kernels.items(), key=lambda item: -item[1])
    ]


def measure(launch: Launch, contender: Contender, model: ModelConfig) -> Measurement:
    """Train a few steps with the largest micro-batch that fits.

    Raises:
        RunError: if none does.
    """
    shape = Shape(model, _TYPICAL_MICRO_BATCH, "bf16")
    step = build_step(contender, shape, launch)
    for micro_batch in range(_first_guess(step, shape, launch.device), 0, -1):
        tokens = draw_tokens(replace(shape, batch=micro_batch), launch.device)
        found = _measure_if_it_fits(step, tokens)
        if found is not None:
            return found
        gc.collect()
        torch.cuda.empty_cache()
    raise RunError(f"{contender}: not even one sequence fits the memory of the device")


def largest_micro_batch(one: int, two: int, memory: int) -> int:
    """Sequences that fit ``memory`` bytes, from the peaks of one and of two of them."""
    return min(MOST_SEQUENCES, 1 + int((_USABLE * memory - one) / (two - one)))


def _first_guess(step: Step, shape: Shape, device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    peaks = []
    # The first step makes the state of the optimizer.
    for batch in (1, 1, 2):
        torch.cuda.reset_peak_memory_stats()
        step(draw_tokens(replace(shape, batch=batch), device))
        peaks.append(torch.cuda.max_memory_allocated())
    _, one, two = peaks
    return largest_micro_batch(one, two, torch.cuda.get_device_properties(device).total_memory)


def _measure_if_it_fits(step: Step, tokens: Tensor) -> Measurement | None:
    try:
        return _measure_step(partial(step, tokens), tokens)
    except torch.OutOfMemoryError:
        return None


def _measure_step(work: Work, tokens: Tensor) -> Measurement:
    on_gpu = tokens.is_cuda
    for _ in range(WARM_UP):
        work()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        seconds = tuple(gpu_seconds(work, repeats=1) for _ in range(STEPS))
    else:
        seconds = tuple(wall_seconds(work) for _ in range(STEPS))
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    kernels = kernel_seconds(work, tokens.device)
    return Measurement(tokens.size(0), Times(seconds), peak, kernels)


def kernel_seconds(work: Work, device: torch.device) -> dict[str, float]:
    """Seconds of one step by kind of kernel: those of the GPU, or torch's operations on a CPU."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        work()
    seconds: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU):
            micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            seconds[kind_of(event.key)] += micros / 1e6
    return dict(seconds)


def kind_of(kernel: str) -> str:
    """What a kernel of this name does."""
    for kind, pattern in _KINDS:
        if re.search(pattern, kernel, re.IGNORECASE):
            return kind
    return "other"


if __name__ == "__main__":
    run_tool(main)
