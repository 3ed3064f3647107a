"""What the engine costs: beside a bare loop over the same model, and beside a pipeline's bound.

    python -m megatron.benchmarks.overhead [--json FILE]

**One process.** A bare loop gives the same weights to torch as they are: backward passes,
``clip_grad_norm_``, AdamW in its fused form. In bf16 it has float32 copies for the optimizer, and
adds up the gradients of microbatches in bf16, where the engine does in float32. Both compute with
one thread, in turns; the CPU time of the process counts. A percent is to be seen, so that there are
eight times as many rounds as elsewhere.

**Pipeline.** Two ranks of one thread each, beside one process of one thread that makes the same
step. If computing was all that there is, a schedule would take

    (time of one process) x (1 + idle slots / slots with a task) / 2

They take turns, and it is the clock on the wall that counts: the machine has to be idle.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.benchmarks.contenders import (
    LR,
    MAX_NORM,
    Shape,
    Step,
    build_engine,
    build_inputs,
    draw_tokens,
    engine_step,
)
from megatron.benchmarks.measure import (
    ROUNDS,
    Times,
    Work,
    check_losses,
    check_quiet,
    cpu_seconds,
    interleave,
    wall_seconds,
)
from megatron.benchmarks.program import build_parser
from megatron.benchmarks.ranks import build_alone, run_alone, run_ranks
from megatron.benchmarks.result import Result, describe_environment, publish
from megatron.benchmarks.train_step import SHAPES
from megatron.cli import run_tool
from megatron.config import ModelConfig, ParallelConfig
from megatron.engine.schedules import plan_training
from megatron.launch import Launch
from megatron.model.init import build_model
from megatron.report.tables import Row, Table
from mpu import ParallelDims

PIPELINE = 2
PROCESS = "one process"
SCHEDULES = {
    "1f1b": ParallelConfig(pipeline=PIPELINE),
    "interleaved_1f1b": ParallelConfig(pipeline=PIPELINE, schedule="interleaved_1f1b", chunks=2),
    "zero_bubble": ParallelConfig(pipeline=PIPELINE, schedule="zero_bubble"),
}

LOOPS = [
    SHAPES["tiny"],
    replace(SHAPES["tiny"], microbatches=4),
    replace(SHAPES["tiny"], dtype="bf16"),
    replace(SHAPES["tiny"], dtype="bf16", microbatches=4),
]
# A vocabulary so small that the head, which the last stage has besides its layers, is no work.
_DEEP = ModelConfig(num_layers=8, hidden_size=256, num_heads=8, vocab_size=64, seq_length=256)
PIPELINES = [Shape(_DEEP, batch=count, microbatches=count) for count in (4, 8)]

_SMALL = ModelConfig(num_layers=4, hidden_size=16, num_heads=2, vocab_size=64, seq_length=8)
QUICK = [Shape(_SMALL, batch=4, microbatches=4)]

_TOLERANCE = 1e-6
"""Relative difference of the first losses, in float32 and bf16: the weights are the same."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    parser = build_parser("The engine beside a bare loop, and beside the bound of a pipeline.")
    parser.add_argument("--noisy", action="store_true", help="accept times that vary")
    args = parser.parse_args(argv)
    rounds, loop_rounds = (2, 2) if args.quick else (ROUNDS, 8 * ROUNDS)
    allow_noise = args.noisy or args.quick
    loops = [
        row_of_loop(shape, _checked(run_alone(time_loops, shape, loop_rounds), allow_noise))
        for shape in (QUICK if args.quick else LOOPS)
    ]
    schedules: list[Row] = []
    for shape in QUICK if args.quick else PIPELINES:
        ranks = run_ranks(ParallelDims(pipeline=PIPELINE), time_schedules, shape, rounds)
        schedules += rows_of_schedules(shape, _checked(ranks[0], allow_noise))
    tables = [
        Table("The engine and a bare loop, in one process", loops),
        Table("Two pipeline ranks, and the bound of their schedule", schedules),
    ]
    publish(Result("overhead", describe_environment("cpu"), tables), args.json)
    return 0


def row_of_loop(shape: Shape, times: Mapping[str, Times]) -> Row:
    """The row of one shape; the ratio is that of tokens a second."""
    engine, bare = times["engine"], times["bare"]
    return {
        **_columns_of(shape),
        "engine, tokens/s": shape.tokens / engine.least,
        "bare loop, tokens/s": shape.tokens / bare.least,
        "speed ratio": bare.least / engine.least,
        "median / least": max(engine.spread, bare.spread),
    }


def rows_of_schedules(shape: Shape, times: Mapping[str, Times]) -> Iterator[Row]:
    """One row for each schedule; the ratio is that of the bound to the time."""
    process = times[PROCESS]
    for name, parallel in SCHEDULES.items():
        bound = process.least * (1 + idle_share(parallel, shape.microbatches)) / PIPELINE
        yield {
            **_columns_of(shape),
            "schedule": name,
            "one process, s": process.least,
            "idle share": f"{idle_share(parallel, shape.microbatches):.1%}",
            "bound, s": bound,
            "2 ranks, s": times[name].least,
            "bound / time": bound / times[name].least,
            "median / least": max(times[name].spread, process.spread),
        }


def idle_share(parallel: ParallelConfig, microbatches: int) -> float:
    """Idle slots of a rank for each slot in which it computes, by the plan of the schedule."""
    plan = plan_training(parallel.schedule, parallel.pipeline, parallel.chunks, microbatches)
    return max(plan.idle_slots(rank) / len(plan.tasks(rank)) for rank in range(parallel.pipeline))


def time_loops(launch: Launch, shape: Shape, rounds: int) -> dict[str, Times]:
    """CPU times of a step of the engine and of the bare loop, once they find the same loss."""
    steps = build_loops(launch, shape)
    tokens = draw_tokens(shape, launch.device)
    losses = {name: step(tokens) for name, step in steps.items()}
    check_losses(losses, losses["bare"], _TOLERANCE)
    works: dict[str, Work] = {name: partial(step, tokens) for name, step in steps.items()}
    return interleave(works, cpu_seconds, rounds=rounds)


def build_loops(launch: Launch, shape: Shape) -> dict[str, Step]:
    """A step of the bare loop and one of the engine, with the same weights."""
    engine = build_engine(shape, launch.groups, launch.device)
    (ours,) = engine.models
    bare = build_model(shape.model, ours.placement, device=launch.device, backend="blocked")
    bare.load_state_dict(ours.state_dict())
    return {
        "bare": bare_step(bare, shape.microbatches),
        "engine": engine_step(engine, microbatches=shape.microbatches),
    }


def bare_step(model: nn.Module, microbatches: int) -> Step:
    """The step that one writes with nothing but torch around ``model``."""
    weights = list(model.parameters())
    mains = weights
    if weights[0].dtype != torch.float32:
        mains = [nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = torch.optim.AdamW(mains, lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(tokens: Tensor) -> float:
        model.zero_grad()
        count = tokens.size(0) * (tokens.size(1) - 1)
        total = torch.zeros(())
        for inputs in build_inputs(tokens, microbatches):
            loss = model(replace(inputs, loss_weights=inputs.loss_weights / count))
            loss.backward()
            total += loss.detach()
        for main, weight in zip(mains, weights, strict=True):
            assert weight.grad is not None
            main.grad = weight.grad.to(main.dtype)
        nn.utils.clip_grad_norm_(mains, MAX_NORM)
        optimizer.step()
        if mains is not weights:
            with torch.no_grad():
                for main, weight in zip(mains, weights, strict=True):
                    weight.copy_(main)
        return total.item()

    return step


def time_schedules(launch: Launch, shape: Shape, rounds: int) -> dict[str, Times]:
    """Times on the wall of one process, on the first rank, and of all schedules, on both.

    Raises:
        RunError: if they do not find the same loss.
    """
    tokens = draw_tokens(shape, launch.device)
    steps = {
        name: engine_step(
            build_engine(shape, launch.groups, launch.device, parallel),
            microbatches=shape.microbatches,
        )
        for name, parallel in SCHEDULES.items()
    }
    losses = {name: step(tokens) for name, step in steps.items()}
    alone = build_alone()
    if launch.rank == 0:
        engine = build_engine(shape, alone, launch.device)
        steps = {PROCESS: engine_step(engine, microbatches=shape.microbatches), **steps}
        check_losses(losses, steps[PROCESS](tokens), _TOLERANCE)
    else:
        steps = {PROCESS: lambda _: 0.0, **steps}
    works = {name: partial(_step_together, step, tokens) for name, step in steps.items()}
    return interleave(works, wall_seconds, rounds=rounds)


def _step_together(step: Step, tokens: Tensor) -> None:
    step(tokens)
    dist.barrier()


def _columns_of(shape: Shape) -> Row:
    return {
        "dtype": shape.dtype,
        "hidden x layers": f"{shape.model.hidden_size} x {shape.model.num_layers}",
        "microbatches": shape.microbatches,
    }


def _checked(times: dict[str, Times], allow_noise: bool) -> dict[str, Times]:
    check_quiet("step", times, allow_noise=allow_noise)
    return times


if __name__ == "__main__":
    run_tool(main)
