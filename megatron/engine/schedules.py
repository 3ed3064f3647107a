"""Pipeline schedules: what each rank of a pipeline computes, sends and receives, in which order.

A schedule is data, made before anything runs. It begins as the order of each rank's tasks:

    1f1b               as many forward passes as there are stages after, then one of each in turn
    interleaved_1f1b   the same with several stages on each rank, microbatches in groups of as many
                       as ranks
    zero_bubble        1f1b whose backward passes are split: input gradients, which the stage before
                       waits for, and weight gradients, which fill the time that would be idle

(Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters"; Qi et al.
2023, "Zero bubble pipeline parallelism", whose ZB-H1 needs no more memory than 1f1b.) The orders
are then run on a clock, each task in the first slot in which what it needs is there. With 2 ranks
and 3 microbatches:

    slot        0    1    2    3    4    5    6    7
    rank 0      F0   F1   .    B0   F2   .    B1   B2 ...
    rank 1      .    F0   B0   F1   B1   F2   B2

The slot of the sender orders all transfers of the pipeline. Every rank starts its own in this
order, after its tasks of the same slot and before those of the next, so that they never wait for
each other in a circle, whether sending blocks or not.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from megatron.config import ScheduleName


class Pass(IntEnum):
    """What a task computes."""

    FORWARD = 0
    BACKWARD = 1
    """Gradients of inputs and weights."""
    INPUT = 2
    """Gradients of inputs."""
    WEIGHT = 3
    """Gradients of weights."""


_UNITS = {Pass.FORWARD: 1, Pass.BACKWARD: 2, Pass.INPUT: 1, Pass.WEIGHT: 1}
"""How long each pass takes, in forward passes."""


@dataclass(frozen=True)
class Task:
    """Compute one pass of a microbatch through one stage."""

    kind: Pass
    stage: int
    microbatch: int


@dataclass(frozen=True)
class Transfer:
    """Move what ``task`` has computed to the rank that holds the stage ``stage``.

    Attributes:
        source: rank of the pipeline that sends.
        target: rank of the pipeline that receives.
    """

    task: Task
    stage: int
    source: int
    target: int


Step: TypeAlias = Task | Transfer


@dataclass(frozen=True)
class Plan:
    """A schedule that has been run on a clock.

    Attributes:
        steps: of each rank, in order. A transfer stands in the steps of both its ranks.
        num_slots: length of the schedule, if every pass takes one slot.
        num_stages: stages of the pipeline, on all ranks together.
    """

    steps: tuple[tuple[Step, ...], ...]
    num_slots: int
    num_stages: int

    def tasks(self, rank: int) -> list[Task]:
        return [step for step in self.steps[rank] if isinstance(step, Task)]

    def idle_slots(self, rank: int) -> int:
        """Slots in which ``rank`` has nothing to do."""
        return self.num_slots - len(self.tasks(rank))


def plan_training(name: ScheduleName, ranks: int, chunks: int, microbatches: int) -> Plan:
    """The plan of a training step.

    Args:
        ranks: size of the pipeline.
        chunks: stages on each rank.
        microbatches: of one data rank; for interleaved_1f1b a multiple of ``ranks``.
    """
    orders = [training_order(name, rank, ranks, chunks, microbatches) for rank in range(ranks)]
    return _plan(orders, ranks * chunks)


def training_order(
    name: ScheduleName, rank: int, ranks: int, chunks: int, microbatches: int
) -> list[Task]:
    """The tasks of ``rank`` in a training step, in the order of ``plan_training``."""
    if name == "zero_bubble":
        return _zero_bubble(rank, ranks, microbatches)
    return _one_f_one_b(rank, ranks, chunks, microbatches)


def plan_evaluation(ranks: int, chunks: int, microbatches: int) -> Plan:
    """The plan of forward passes alone."""
    orders = [_forwards(rank, ranks, chunks, microbatches) for rank in range(ranks)]
    return _plan(orders, ranks * chunks)


def idle_share(plan: Plan) -> float:
    """Share of its time that the average rank waits, with stages of equal work.

    A forward pass takes one unit of time, and so do the gradients of inputs and those of weights.
    """
    ranks = len(plan.steps)
    waiting = [plan.tasks(rank)[::-1] for rank in range(ranks)]
    free = [0] * ranks
    ends: dict[Task, int] = {}
    while any(waiting):
        for rank, tasks in enumerate(waiting):
            while tasks and (needed := _needed(tasks[-1], plan.num_stages)) <= ends.keys():
                task = tasks.pop()
                start = max(free[rank], *(ends[other] for other in needed), 0)
                ends[task] = free[rank] = start + _UNITS[task.kind]
    busy = sum(_UNITS[task.kind] for task in ends)
    return 1 - busy / (ranks * max(free))


def ideal_idle_share(name: ScheduleName, ranks: int, chunks: int, microbatches: int) -> float:
    """What ``idle_share`` is in theory, with p ranks, v chunks and m microbatches.

    A rank waits for p - 1 passes of one microbatch through one stage, forward and backward: a share
    of (p - 1) / (v m + p - 1). zero_bubble fills two thirds of that: (p - 1) / (3 m + p - 1).
    """
    units = 3 if name == "zero_bubble" else chunks
    return (ranks - 1) / (units * microbatches + ranks - 1)


def _forwards(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Task]:
    """Forward passes in groups of ``ranks`` microbatches, each through all chunks of the rank."""
    return [
        Task(Pass.FORWARD, chunk * ranks + rank, microbatch)
        for first in range(0, microbatches, ranks)
        for chunk in range(chunks)
        for microbatch in range(first, min(first + ranks, microbatches))
    ]


def _backwards(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Task]:
    last = (chunks - 1) * ranks + 2 * rank
    return [
        Task(Pass.BACKWARD, last - task.stage, task.microbatch)
        for task in _forwards(rank, ranks, chunks, microbatches)
    ]


def _one_f_one_b(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Task]:
    forwards = _forwards(rank, ranks, chunks, microbatches)
    backwards = _backwards(rank, ranks, chunks, microbatches)
    ahead = ranks - rank - 1
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * ranks
    ahead = min(ahead, len(forwards))
    pairs = zip(forwards[ahead:], backwards, strict=False)
    in_turn = [task for pair in pairs for task in pair]
    return forwards[:ahead] + in_turn + backwards[len(forwards) - ahead :]


def _zero_bubble(rank: int, ranks: int, microbatches: int) -> list[Task]:
    """1f1b, whose weight gradients wait for ``rank`` further input gradients.

    Later ranks start their forward passes later, and so have to wait less for gradients; the same
    number of weight gradients, put off, fills the end of the step instead.
    """
    order: list[Task] = []
    done = 0
    for task in _one_f_one_b(rank, ranks, 1, microbatches):
        if task.kind is Pass.FORWARD:
            order.append(task)
            continue
        order.append(Task(Pass.INPUT, rank, task.microbatch))
        if task.microbatch >= rank:
            order.append(Task(Pass.WEIGHT, rank, done))
            done += 1
    return order + [Task(Pass.WEIGHT, rank, index) for index in range(done, microbatches)]


def _plan(orders: Sequence[Sequence[Task]], num_stages: int) -> Plan:
    slots = _run_on_clock(orders, num_stages)
    ranks = len(orders)
    transfers = [
        (slot, Transfer(task, target, task.stage % ranks, target % ranks))
        for task, slot in slots.items()
        if (target := _receiver(task, num_stages)) is not None
    ]
    transfers.sort(key=lambda item: (item[0], item[1].source, item[1].task.kind))
    steps = tuple(_steps_of(rank, order, slots, transfers) for rank, order in enumerate(orders))
    return Plan(steps, max(slots.values()) + 1, num_stages)


def _steps_of(
    rank: int,
    order: Iterable[Task],
    slots: Mapping[Task, int],
    transfers: Iterable[tuple[int, Transfer]],
) -> tuple[Step, ...]:
    """The tasks of a rank and its transfers, which follow those of their slot."""
    timed: list[tuple[int, int, Step]] = [(slots[task], 0, task) for task in order]
    timed += [(slot, 1, t) for slot, t in transfers if rank in (t.source, t.target)]
    # The sort is stable, which keeps the order of the transfers of a slot.
    return tuple(step for *_, step in sorted(timed, key=lambda item: item[:2]))


def _run_on_clock(orders: Sequence[Sequence[Task]], num_stages: int) -> dict[Task, int]:
    """The slot of every task, if each takes one."""
    slots: dict[Task, int] = {}
    position = [0] * len(orders)
    slot = 0
    while any(at < len(order) for at, order in zip(position, orders, strict=True)):
        ready = [
            order[at]
            for at, order in zip(position, orders, strict=True)
            if at < len(order) and _needed(order[at], num_stages) <= slots.keys()
        ]
        for task in ready:
            position[task.stage % len(orders)] += 1
        slots |= dict.fromkeys(ready, slot)
        assert ready, "the schedule waits for itself"
        slot += 1
    return slots


def _needed(task: Task, num_stages: int) -> set[Task]:
    """The tasks whose results ``task`` takes from other stages, or from its own forward pass."""
    if task.kind is Pass.FORWARD:
        before = task.stage - 1
        return set() if before < 0 else {Task(Pass.FORWARD, before, task.microbatch)}
    if task.kind is Pass.WEIGHT:
        return {Task(Pass.INPUT, task.stage, task.microbatch)}
    after = task.stage + 1
    if after == num_stages:
        return {Task(Pass.FORWARD, task.stage, task.microbatch)}
    return {Task(task.kind, after, task.microbatch)}


def _receiver(task: Task, num_stages: int) -> int | None:
    """The stage that waits for the result of ``task``, if there is one."""
    if task.kind is Pass.WEIGHT:
        return None
    stage = task.stage + (1 if task.kind is Pass.FORWARD else -1)
    return stage if 0 <= stage < num_stages else None
