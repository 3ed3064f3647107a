"""Plans as data: complete, in an order that never waits for itself, and as good as theory says.

Letters: p ranks of the pipeline, m microbatches, v chunks (stages on each rank).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from typing import cast
from unittest.mock import MagicMock

import pytest
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.pipelining.stage import _PipelineStageBase

from megatron.config import ScheduleName
from megatron.engine.schedules import (
    Pass,
    Plan,
    Task,
    Transfer,
    plan_evaluation,
    plan_training,
)

RANKS = (1, 2, 3, 4, 8)
PIPELINES = RANKS[1:]


def trainings() -> Iterator[tuple[ScheduleName, int, int, int]]:
    """Name, p, v and m of many plans."""
    for p in RANKS:
        for m in (p, 2 * p + 1, 4 * p):
            yield "1f1b", p, 1, m
            if p > 1:
                yield "zero_bubble", p, 1, m
            for v in (2, 3) if p > 1 and m % p == 0 else ():
                yield "interleaved_1f1b", p, v, m


def evaluations() -> Iterator[tuple[str, int, int, int]]:
    for p in RANKS:
        for m in (1, p, 2 * p + 1):
            for v in (1, 2) if p > 1 else (1,):
                yield "evaluation", p, v, m


TRAININGS = sorted(set(trainings()))
PLANS = [*TRAININGS, *sorted(set(evaluations()))]


@cache
def make_plan(name: str, p: int, v: int, m: int) -> Plan:
    if name == "evaluation":
        return plan_evaluation(p, v, m)
    return plan_training(name, p, v, m)  # type: ignore[arg-type]


def passes(name: str) -> tuple[Pass, ...]:
    if name == "evaluation":
        return (Pass.FORWARD,)
    if name == "zero_bubble":
        return (Pass.FORWARD, Pass.INPUT, Pass.WEIGHT)
    return (Pass.FORWARD, Pass.BACKWARD)


@pytest.mark.parametrize(("name", "p", "v", "m"), PLANS)
def test_every_task_is_done_once_by_the_rank_of_its_stage(
    name: str, p: int, v: int, m: int
) -> None:
    plan = make_plan(name, p, v, m)
    assert plan.num_stages == p * v
    assert len(plan.steps) == p
    for rank in range(p):
        expected = {
            Task(kind, stage, microbatch)
            for kind in passes(name)
            for stage in range(rank, p * v, p)
            for microbatch in range(m)
        }
        assert Counter(plan.tasks(rank)) == Counter(expected)


@pytest.mark.parametrize(("name", "p", "v", "m"), PLANS)
def test_every_task_finds_what_it_needs(name: str, p: int, v: int, m: int) -> None:
    """Computed here before, or received for this stage before."""
    plan = make_plan(name, p, v, m)
    for rank in range(p):
        there: set[tuple[Task, int]] = set()
        for step in plan.steps[rank]:
            if isinstance(step, Task):
                assert needs(step, p * v) <= there, step
                there.add((step, step.stage))
            elif step.source == rank:
                assert (step.task, step.task.stage) in there, step
            else:
                there.add((step.task, step.stage))


def needs(task: Task, stages: int) -> set[tuple[Task, int]]:
    """What ``task`` starts from, and the stage that it is for."""
    kind, stage, microbatch = task.kind, task.stage, task.microbatch
    if kind is Pass.FORWARD:
        return {(Task(kind, stage - 1, microbatch), stage)} if stage > 0 else set()
    if kind is Pass.WEIGHT:
        return {(Task(Pass.INPUT, stage, microbatch), stage)}
    own = {(Task(Pass.FORWARD, stage, microbatch), stage)}
    return own | ({(Task(kind, stage + 1, microbatch), stage)} if stage < stages - 1 else set())


@pytest.mark.parametrize(("name", "p", "v", "m"), PLANS)
def test_nothing_is_sent_that_nobody_needs(name: str, p: int, v: int, m: int) -> None:
    """Every stage hands each result on once: hidden states down, their gradients up."""
    plan = make_plan(name, p, v, m)
    directions = len([kind for kind in passes(name) if kind is not Pass.WEIGHT])
    sent = [
        step
        for rank in range(p)
        for step in plan.steps[rank]
        if isinstance(step, Transfer) and step.source == rank
    ]
    assert len(set(sent)) == len(sent) == directions * (p * v - 1) * m
    for transfer in sent:
        assert (transfer.source, transfer.target) == (transfer.task.stage % p, transfer.stage % p)


@pytest.mark.parametrize(("name", "p", "v", "m"), PLANS)
def test_transfers_of_two_ranks_have_one_order(name: str, p: int, v: int, m: int) -> None:
    plan = make_plan(name, p, v, m)
    for one in range(p):
        for other in range(one):
            assert transfers(plan, one, other) == transfers(plan, other, one)


def transfers(plan: Plan, rank: int, peer: int) -> list[Transfer]:
    """Of the steps of ``rank``, those that it shares with ``peer``."""
    return [
        step
        for step in plan.steps[rank]
        if isinstance(step, Transfer) and {step.source, step.target} == {rank, peer}
    ]


@pytest.mark.parametrize(("name", "p", "v", "m"), PLANS)
def test_a_plan_runs_to_its_end_where_every_transfer_blocks(
    name: str, p: int, v: int, m: int
) -> None:
    """Both ranks of a transfer stop until the other has come to it."""
    plan = make_plan(name, p, v, m)
    position = [0] * p
    moved = True
    while moved:
        moved = False
        for rank in range(p):
            while (step := next_step(plan, rank, position)) is not None:
                if isinstance(step, Task):
                    position[rank] += 1
                elif step == next_step(plan, step.source + step.target - rank, position):
                    position[step.source] += 1
                    position[step.target] += 1
                else:
                    break
                moved = True
    assert position == [len(steps) for steps in plan.steps]


def next_step(plan: Plan, rank: int, position: list[int]) -> Task | Transfer | None:
    steps = plan.steps[rank]
    return steps[position[rank]] if position[rank] < len(steps) else None


@pytest.mark.parametrize(("name", "p", "v", "m"), TRAININGS)
def test_few_microbatches_are_in_flight(name: str, p: int, v: int, m: int) -> None:
    """From the forward pass to the last gradient of the stage; for v stages, of each of them."""
    most = {
        "1f1b": lambda rank: p - rank,
        "zero_bubble": lambda rank: p,
        "interleaved_1f1b": lambda rank: 2 * (p - rank - 1) + (v - 1) * p + 1,
    }[name]
    last = passes(name)[-1]
    for rank in range(p):
        in_flight = highest = 0
        for task in make_plan(name, p, v, m).tasks(rank):
            in_flight += (task.kind is Pass.FORWARD) - (task.kind is last)
            highest = max(highest, in_flight)
        assert highest <= min(most(rank), m * v)


@pytest.mark.parametrize(("name", "p", "v", "m"), TRAININGS)
def test_ranks_are_idle_as_long_as_theory_says(name: str, p: int, v: int, m: int) -> None:
    """In passes of one stage: of 1f1b they are v times as long as of interleaved_1f1b."""
    idle = p - 1 if name == "zero_bubble" else 2 * (p - 1)
    plan = make_plan(name, p, v, m)
    assert [plan.idle_slots(rank) for rank in range(p)] == [idle] * p


@pytest.mark.parametrize(("p", "m"), [(p, m) for p in PIPELINES for m in (p, p + 1, 2 * p, 5 * p)])
def test_1f1b_has_the_order_of_torch(p: int, m: int) -> None:
    schedule = Schedule1F1B(fake_stage(0, p, p), m)
    assert schedule.pipeline_order is not None
    plan = make_plan("1f1b", p, 1, m)
    for rank in range(p):
        assert words(plan.tasks(rank)) == renumbered(schedule.pipeline_order[rank])


@pytest.mark.parametrize("v", [2, 3])
@pytest.mark.parametrize(("p", "m"), [(p, m) for p in PIPELINES for m in (p, 2 * p, 3 * p, 5 * p)])
def test_interleaved_1f1b_has_the_order_of_torch(p: int, v: int, m: int) -> None:
    stages = [fake_stage(stage, p, p * v) for stage in range(0, p * v, p)]
    schedule = ScheduleInterleaved1F1B(stages, m)
    plan = make_plan("interleaved_1f1b", p, v, m)
    for rank in range(p):
        assert words(plan.tasks(rank)) == renumbered(schedule.pipeline_order[rank])


def fake_stage(index: int, ranks: int, stages: int) -> _PipelineStageBase:
    """What a schedule of torch asks for when it makes its order, on the first rank."""
    stage = MagicMock(spec=_PipelineStageBase)
    stage.stage_index, stage.num_stages = index, stages
    stage.group_rank, stage.group_size = 0, ranks
    stage.is_last = index == stages - 1
    return cast(_PipelineStageBase, stage)


def words(tasks: list[Task]) -> list[str]:
    return [f"{task.stage}{'FB'[task.kind]}{task.microbatch}" for task in tasks]


def renumbered(actions: Iterable[object]) -> list[str]:
    """Torch's passes in its words; some releases count those of the last rank's forward from 1."""
    found = re.findall(r"\b(\d+)([FB])(\d+)\b", " ".join(map(str, actions)))
    first = {"F": min(int(microbatch) for _, kind, microbatch in found if kind == "F"), "B": 0}
    return [f"{stage}{kind}{int(microbatch) - first[kind]}" for stage, kind, microbatch in found]


@pytest.mark.parametrize(("name", "p", "v", "m"), PLANS)
def test_microbatches_of_a_stage_follow_each_other(name: str, p: int, v: int, m: int) -> None:
    """So that sums over microbatches have one order whatever the schedule."""
    plan = make_plan(name, p, v, m)
    for stage in range(p * v):
        for kind in passes(name):
            order = [
                task.microbatch
                for task in plan.tasks(stage % p)
                if (task.stage, task.kind) == (stage, kind)
            ]
            assert all(a < b for a, b in pairwise(order))
