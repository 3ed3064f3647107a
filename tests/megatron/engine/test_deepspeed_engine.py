"""The engine on DeepSpeed makes the steps of the engine on plain torch, at every layout it has.

In fp32, with dropout, warm-up, clipping, weight decay and tokens that do not count. The suite takes
a few of all layouts; the marker nightly has the rest.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
import torch

from tests.distributed import preload, run_ranks
from tests.figures import Figure
from tests.megatron.engine.layouts import Zero
from tests.megatron.engine.training import Layout, Run, join_states, run_training

pytest.importorskip("deepspeed", reason="the package deepspeed is optional")
preload("megatron.engine.deepspeed.engine", "deepspeed.runtime.zero.muon.muon_optimizer")

STEPS = 20
TOLERANCE = 1e-5


def every() -> Iterator[Layout]:
    """All layouts of one or two ranks an axis; those with tensor ranks have the sequence cut."""
    for tensor, pipeline, data, zero, tied in product(
        (1, 2), (1, 2), (1, 2), get_args(Zero), (True, False)
    ):
        if pipeline == 1 or zero < 2:
            yield Layout(
                tensor=tensor,
                pipeline=pipeline,
                data=data,
                zero=zero,
                sequence=tensor > 1 and tied,
                micro_batch=2 // data,
                tied=tied,
                num_layers=2 if pipeline == 1 else 4,
                engine="deepspeed",
            )


EVERY = list(every())

CHOSEN = [
    Layout(micro_batch=2, num_layers=2, engine="deepspeed"),
    Layout(zero=3, micro_batch=2, tied=False, num_layers=2, engine="deepspeed"),
    Layout(data=2, zero=2, num_layers=2, engine="deepspeed"),
    Layout(tensor=2, data=2, tied=False, num_layers=2, engine="deepspeed"),
    Layout(tensor=2, data=2, zero=1, sequence=True, num_layers=2, engine="deepspeed"),
    Layout(tensor=2, data=2, zero=3, sequence=True, num_layers=2, engine="deepspeed"),
    Layout(tensor=2, pipeline=2, sequence=True, micro_batch=2, engine="deepspeed"),
    Layout(pipeline=2, data=2, zero=1, engine="deepspeed"),
    Layout(tensor=2, pipeline=2, data=2, zero=1, tied=False, engine="deepspeed"),
]
# Recomputation, and other numbers of microbatches.
OTHERS = [
    Layout(data=2, zero=3, micro_batch=4, recompute="full", num_layers=2, engine="deepspeed"),
    Layout(pipeline=2, micro_batch=1, recompute="selective", engine="deepspeed"),
]
NIGHTLY = [
    pytest.param(layout, marks=pytest.mark.nightly) for layout in EVERY if layout not in CHOSEN
]


@cache
def torch_run(tied: bool, num_layers: int) -> Run:
    layout = Layout(micro_batch=2, tied=tied, num_layers=num_layers)
    return run_training(layout, STEPS, "fp32")


@pytest.mark.parametrize("layout", [*CHOSEN, *OTHERS, *NIGHTLY], ids=str)
def test_training_equals_the_engine_torch(layout: Layout, figure: Figure) -> None:
    want, got = torch_run(layout.tied, layout.num_layers), run_training(layout, STEPS, "fp32")
    steps = list(zip(got.results, want.results, strict=True))
    worst = {
        "loss": max(abs(a.loss / b.loss - 1) for a, b in steps),
        "norm": max(abs(a.grad_norm / b.grad_norm - 1) for a, b in steps),
        "evaluation": abs(got.evaluation / want.evaluation - 1),
    }
    grid = f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"
    figure(f"deepspeed equals torch: {grid}, ZeRO {layout.zero}", **worst)
    figure("deepspeed equals torch: all of them", **worst)
    assert {name: error for name, error in worst.items() if not error <= TOLERANCE} == {}


def test_every_layout_of_deepspeed_is_there_once() -> None:
    assert len(set(map(str, EVERY))) == len(EVERY) == 48
    assert set(CHOSEN) <= set(EVERY)
