"""The layouts that training is compared at: all that eight ranks allow, and a few of them.

    tensor       1, 2, 4; from 2 on with and without sequence parallelism
    pipeline     1, 2, 4; from 2 on with each schedule
    data         1, 2
    ZeRO         0 to 3; below 2 with zero_bubble
    embeddings   tied and not

Recomputation takes turns. Each data rank has four microbatches, which suits every schedule.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal, TypeAlias, get_args

from megatron.config import Recompute, ScheduleName
from tests.megatron.engine.training import GLOBAL_BATCH, NUM_LAYERS, Layout

MOST_RANKS = 8
MICROBATCHES = 4
FEWEST_LAYERS = 2
"""Of a model that is no pipeline, where more would take time and show nothing."""

Zero: TypeAlias = Literal[0, 1, 2, 3]


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
                num_layers=FEWEST_LAYERS if pipeline == 1 else max(NUM_LAYERS, pipeline * chunks),
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


EVERY = list(_with_recomputation())

# Each two values of two axes meet in one of these; no ranks are spent on more.
CHOSEN = [
    Layout(micro_batch=2, num_layers=2),
    Layout(
        pipeline=2,
        zero=1,
        micro_batch=2,
        schedule="interleaved_1f1b",
        chunks=2,
        tied=False,
        recompute="full",
    ),
    Layout(pipeline=2, zero=3, micro_batch=2, tied=False, recompute="selective"),
    Layout(pipeline=4, micro_batch=2, schedule="zero_bubble", recompute="selective"),
    Layout(
        pipeline=4,
        zero=3,
        micro_batch=2,
        schedule="interleaved_1f1b",
        chunks=2,
        recompute="selective",
        num_layers=8,
    ),
    Layout(pipeline=4, data=2, zero=1, schedule="zero_bubble", tied=False),
    Layout(pipeline=4, data=2, zero=2, recompute="selective"),
    Layout(
        tensor=2,
        zero=1,
        sequence=True,
        micro_batch=2,
        tied=False,
        recompute="selective",
        num_layers=2,
    ),
    Layout(tensor=2, pipeline=2, data=2, sequence=True, schedule="zero_bubble", recompute="full"),
    Layout(tensor=2, pipeline=2, data=2, zero=2, schedule="interleaved_1f1b", chunks=2, tied=False),
    Layout(
        tensor=2,
        pipeline=4,
        zero=3,
        sequence=True,
        micro_batch=2,
        tied=False,
        recompute="full",
    ),
    Layout(tensor=4, zero=2, sequence=True, micro_batch=2, recompute="full", num_layers=2),
    Layout(tensor=4, data=2, zero=3, sequence=True, tied=False, num_layers=2),
    Layout(
        tensor=4,
        pipeline=2,
        sequence=True,
        micro_batch=2,
        schedule="interleaved_1f1b",
        chunks=2,
        tied=False,
        recompute="selective",
    ),
    Layout(tensor=4, pipeline=2, zero=1, micro_batch=2, schedule="zero_bubble", recompute="full"),
]
