"""The same training step on both engines: speed and memory.

    python -m megatron.benchmarks.engines [--json FILE]

One process, with the optimizer's state shared out over it alone (ZeRO 1), so that both engines keep
weights, sums of gradients and moments in the same precisions. They take turns once they find the
same loss, and the memory of each is measured in a process of its own: all that it needs to be built
and to make two steps. DeepSpeed takes part where it is installed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

from megatron.benchmarks.contenders import Shape, Step, draw_tokens, engine_step, make_config
from megatron.benchmarks.flops import BLOOM
from megatron.benchmarks.measure import (
    ROUNDS,
    Times,
    Work,
    check_losses,
    interleave,
    timer_of,
)
from megatron.benchmarks.program import Run, run_benchmark
from megatron.benchmarks.result import MIB
from megatron.benchmarks.train_step import QUICK, SHAPES, bytes_of_steps
from megatron.cli import run_tool
from megatron.config import EngineConfig, ParallelConfig
from megatron.engine.base import Engine
from megatron.engine.build import build_engine
from megatron.launch import Launch, read_environment
from megatron.report.tables import Row, Table
from megatron.tuning.attention import choose_backend

ENGINES = {"torch": EngineConfig()}
if find_spec("deepspeed"):
    ENGINES["deepspeed"] = EngineConfig(name="deepspeed")

CPU = {
    "med": replace(SHAPES["med"], microbatches=2),
    "med, bf16": replace(SHAPES["med"], microbatches=2, dtype="bf16"),
}
GPU = {"1b7": Shape(BLOOM["1b7"], batch=8, microbatches=2, dtype="bf16")}

_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
"""Relative difference of the first losses."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    description = "Speed and memory of a training step on both engines."
    return run_benchmark("engines", description, measure, argv)


def measure(run: Run) -> Iterator[Table]:
    """One table for all shapes."""
    rows: list[Row] = []
    for name, shape in run.choose(quick=QUICK, cpu=CPU, cuda=GPU).items():
        times = run.timed(f"engines, {name}", time_engines, shape)
        memory = {engine: run.alone(measure_memory, shape, engine) for engine in ENGINES}
        rows += rows_of(name, shape, times, memory)
    yield Table("A step on both engines", rows)


def rows_of(
    name: str, shape: Shape, times: Mapping[str, Times], memory: Mapping[str, int]
) -> Iterator[Row]:
    """One row for each engine; the ratio is to engine torch, greater is faster."""
    for engine, found in times.items():
        yield {
            "model": name,
            "dtype": shape.dtype,
            "engine": engine,
            "s a step": found.least,
            "tokens/s": shape.tokens / found.least,
            "times torch's speed": times["torch"].least / found.least,
            "median / least": found.spread,
            "peak MiB": memory[engine] / MIB,
        }


def time_engines(launch: Launch, shape: Shape) -> dict[str, Times]:
    """Times of both engines, once they agree on the loss."""
    steps = {name: build_step(launch, shape, name) for name in ENGINES}
    tokens = draw_tokens(shape, launch.device)
    losses = {name: step(tokens) for name, step in steps.items()}
    check_losses(losses, losses["torch"], _TOLERANCE[shape.dtype])
    works: dict[str, Work] = {name: partial(step, tokens) for name, step in steps.items()}
    return interleave(works, timer_of(launch.device), rounds=ROUNDS)


def measure_memory(launch: Launch, shape: Shape, engine: str) -> int:
    """Peak bytes of building an engine and taking two steps."""
    return bytes_of_steps(lambda shape: build_step(launch, shape, engine), shape, launch)


def build_step(launch: Launch, shape: Shape, name: str) -> Step:
    """A step of the engine of that name, with freshly drawn weights."""
    config = make_config(shape, ParallelConfig(zero=1), ENGINES[name])
    choice = choose_backend(config, launch.device, {}, group=launch.groups.tensor)
    engine: Engine = build_engine(config, launch, read_environment(), choice.backend)
    return engine_step(engine, microbatches=shape.microbatches)


if __name__ == "__main__":
    run_tool(main)
