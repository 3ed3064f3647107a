"""What each change to the training step gains: as predicted by arithmetic, and as measured.

    python -m megatron.benchmarks.gains [--device cuda] [--json FILE]

A gain is how many times as long the step takes without the change. It is measured in turns, of the
step as it is and of the same step with one change undone (``ablations``); of a change that was not
kept, with that one made. The predictions stand in ``changes``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch.distributed as dist

from megatron.benchmarks.ablations import ABLATIONS, Ablation, Context
from megatron.benchmarks.changes import CPU_CHANGES, GPU_CHANGES, Change
from megatron.benchmarks.contenders import Shape, build_engine, draw_tokens, engine_step
from megatron.benchmarks.flops import BLOOM
from megatron.benchmarks.measure import (
    ROUNDS,
    Timer,
    Times,
    check_losses,
    cpu_seconds,
    gpu_seconds,
    interleave,
    runnable,
    wall_seconds,
)
from megatron.benchmarks.program import Run, run_benchmark
from megatron.benchmarks.ranks import run_ranks
from megatron.benchmarks.train_step import QUICK, SHAPES
from megatron.cli import run_tool
from megatron.launch import Launch
from megatron.report.tables import Cell, Row, Table
from mpu import ParallelDims


@dataclass(frozen=True)
class Step:
    """A training step of our engine, on tensor ranks."""

    shape: Shape
    ranks: int = 1


STEPS = {
    "med": Step(SHAPES["med"]),
    "bigvocab": Step(SHAPES["bigvocab"]),
    "wide bf16": Step(SHAPES["wide"]),
    "wide, 2 ranks": Step(replace(SHAPES["wide"], dtype="fp32"), ranks=2),
    "1b7": Step(Shape(BLOOM["1b7"], batch=4, dtype="bf16")),
}

_AS_IT_IS = "as it is"
_TOLERANCE = 1e-2
"""Relative difference of the losses: products of bf16 round differently."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    description = "Gains of the changes to the training step, predicted and measured."
    return run_benchmark("gains", description, measure, argv)


def measure(run: Run) -> Iterator[Table]:
    """The changes that matter on the device; on a CPU, those for a GPU as predicted, too."""
    if run.device == "cuda":
        yield Table("Gains on a GPU", _measured_rows(run, GPU_CHANGES))
        return
    yield Table("Gains on a CPU", _measured_rows(run, CPU_CHANGES))
    predicted = [row_of(change, {}) for change in GPU_CHANGES]
    yield Table("Gains on a GPU, predicted for an H200", predicted)


def row_of(change: Change, times: Mapping[str, Times]) -> Row:
    """The row of a change, with the times of its step, if that was measured."""
    both = (_AS_IT_IS, change.ablation)
    found = [contender.spread for name, contender in times.items() if name in both]
    return {
        "change": change.what,
        "instead of": change.instead_of,
        "step": change.step,
        "predicted": change.predicted,
        "measured": gain(change, times),
        "median / least": max(found) if len(found) == 2 else None,
        "kept": change.kept,
        "why": change.why,
    }


def gain(change: Change, times: Mapping[str, Times]) -> Cell:
    """How many times as long the step takes without the change."""
    if change.ablation is None or not times:
        return "not measured"
    if change.ablation not in times:
        return "does not run"
    ratio = times[change.ablation].least / times[_AS_IT_IS].least
    return 1 / ratio if change.kept == "no" else ratio


def time_ablations(
    launch: Launch, shape: Shape, ablations: Sequence[Ablation], rounds: int
) -> dict[str, Times]:
    """Times of the step as it is and of those of ``ablations`` that run.

    Nothing is learnt, so that all steps compute with the same numbers.

    Raises:
        RunError: if they do not find the same loss.
    """
    engine = build_engine(shape, launch.groups, launch.device)
    step, tokens = engine_step(engine, lr=0.0), draw_tokens(shape, launch.device)
    losses: dict[str, float] = {}

    def work(name: str, context: Context) -> None:
        with context(engine):
            losses[name] = step(tokens)
        if launch.world_size > 1:
            dist.barrier()

    contexts: dict[str, Context] = {_AS_IT_IS: nullcontext}
    contexts |= {name: ABLATIONS[name] for name in ablations}
    works = {name: partial(work, name, context) for name, context in contexts.items()}
    able = runnable(works)
    check_losses(losses, losses[_AS_IT_IS], _TOLERANCE)
    return interleave(able, _timer(launch), rounds=rounds)


def _measured_rows(run: Run, changes: Sequence[Change]) -> list[Row]:
    times = {step: _times(run, step, changes) for step in _steps(changes)}
    return [row_of(change, times[change.step]) for change in changes]


def _steps(changes: Iterable[Change]) -> list[str]:
    """Their steps, each once."""
    return list(dict.fromkeys(change.step for change in changes if change.ablation))


def _times(run: Run, name: str, changes: Iterable[Change]) -> dict[str, Times]:
    """Times of the step ``name`` and of its ablations, on its ranks."""
    step = STEPS[name]
    shape = replace(QUICK["quick"], dtype=step.shape.dtype) if run.quick else step.shape
    ablations = [c.ablation for c in changes if c.step == name and c.ablation]
    rounds = 2 if run.quick else ROUNDS
    dims = ParallelDims(tensor=step.ranks)
    ranks = run_ranks(dims, time_ablations, shape, ablations, rounds, device=run.device)
    times: dict[str, Times] = ranks[0]
    run.check(f"step {name}", times)
    return times


def _timer(launch: Launch) -> Timer:
    if launch.world_size > 1:
        return wall_seconds
    if launch.device.type == "cuda":
        return partial(gpu_seconds, repeats=1)
    return cpu_seconds


if __name__ == "__main__":
    run_tool(main)
