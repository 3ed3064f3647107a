"""The layouts that training is compared at: all that eight ranks allow, and a choice of them.

    tensor       1, 2, 4; from 2 on with and without sequence parallelism
    pipeline     1, 2, 4; from 2 on with each schedule
    data         1, 2
    ZeRO         0 to 3; below 2 with zero_bubble
    embeddings   tied and not

Recomputation takes turns. Each data rank has four microbatches, which suits every schedule.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Literal, TypeAlias, get_args

from megatron.config import Recompute, ScheduleName
from tests.megatron.engine.training import GLOBAL_BATCH, NUM_LAYERS, Layout

MOST_RANKS = 8
MICROBATCHES = 4

Zero: TypeAlias = Literal[0, 1, 2, 3]
Values: TypeAlias = tuple[tuple[str, object], ...]

_AXES = ("tensor", "pipeline", "data", "zero", "schedule", "sequence", "tied", "recompute")


def _combinations() -> Iterator[Layout]:
    for tensor, pipeline, data, zero, tied in product(
        (1, 2, 4), (1, 2, 4), (1, 2), get_args(Zero), (True, False)
    ):
        for schedule, sequence in product(_schedules(pipeline, zero), (False, True)):
            chunks = 2 if schedule == "interleaved_1f1b" else 1
            layout = Layout(
                tensor=tensor,
                pipeline=pipeline,
                data=data,
                zero=zero,
                sequence=sequence,
                micro_batch=GLOBAL_BATCH // data // MICROBATCHES,
                schedule=schedule,
                chunks=chunks,
                tied=tied,
                num_layers=max(NUM_LAYERS, pipeline * chunks),
            )
            if layout.world_size <= MOST_RANKS and (tensor > 1 or not sequence):
                yield layout


def _schedules(pipeline: int, zero: Zero) -> Sequence[ScheduleName]:
    if pipeline == 1:
        return ("1f1b",)
    return [name for name in get_args(ScheduleName) if name != "zero_bubble" or zero < 2]


def _with_recomputation() -> Iterator[Layout]:
    """Every combination, with each kind of recomputation in turn."""
    kinds = get_args(Recompute)
    for index, layout in enumerate(_combinations()):
        yield replace(layout, recompute=kinds[index % len(kinds)])


def _pairs(layout: Layout) -> set[Values]:
    """Every two axes with their values."""
    values = [(axis, getattr(layout, axis)) for axis in _AXES]
    return set(combinations(values, 2))


def _cover(layouts: Sequence[Layout]) -> list[Layout]:
    """Few of ``layouts`` that have every pair of values of two axes that all of them have.

    The next is always the one with the most pairs that are missing, of equal ones the smallest.
    """
    pairs = {layout: _pairs(layout) for layout in layouts}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(layouts, key=lambda layout: (len(pairs[layout] & missing), -layout.world_size))
        chosen.append(best)
        missing -= pairs[best]
    return chosen


EVERY = list(_with_recomputation())
CHOSEN = _cover(EVERY)
