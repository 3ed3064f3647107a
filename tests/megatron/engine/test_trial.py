"""A trial costs what a step costs, and leaves nothing behind."""

from dataclasses import replace
from typing import Literal

import pytest
import torch

from tests.distributed import run_ranks
from tests.megatron.engine.training import (
    DEEPSPEED_KINDS,
    Dtype,
    Layout,
    build_any_engine,
    build_engine,
    make_config,
    microbatches,
    train,
)

LAYOUTS = [
    Layout(),
    Layout(tensor=2, sequence=True),
    Layout(data=2, zero=1),
    Layout(data=2, zero=2),
    Layout(data=2, zero=3),
    Layout(pipeline=2),
    Layout(pipeline=2, schedule="zero_bubble"),
]


@pytest.mark.parametrize("layout", [*LAYOUTS, *DEEPSPEED_KINDS], ids=str)
def test_a_trial_changes_no_bit_of_what_follows(layout: Layout) -> None:
    run_ranks(layout.world_size, check_trial, layout, None)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_trial_in_low_precision_changes_no_bit(dtype: Literal["bf16", "fp16"]) -> None:
    run_ranks(1, check_trial, Layout(), dtype)


def check_trial(layout: Layout, dtype: Dtype | None) -> None:
    """Trials before the first step and between steps, of other samples and microbatches."""
    config = make_config(layout, dtype)
    size = 2 * config.train.least_micro_batch_size
    larger = replace(config, train=replace(config.train, micro_batch_size=size))
    engine, groups = build_any_engine(config)
    twin, twin_groups = build_any_engine(config)
    for step in range(3):
        engine.trial(microbatches(larger, 7, groups))
        assert list(train(engine, config, groups, range(step, step + 1))) == list(
            train(twin, config, twin_groups, range(step, step + 1))
        )
    for state, twin_state in zip(engine.state(), twin.state(), strict=True):
        assert state.name == twin_state.name
        for box, twin_box in zip(state.boxes, twin_state.boxes, strict=True):
            assert torch.equal(box.tensor, twin_box.tensor), state.name


def test_a_trial_computes_gradients() -> None:
    """So that it costs a step's time and memory."""
    assert run_ranks(1, count_backward_passes) == [[8, 8]]


def count_backward_passes() -> list[int]:
    """Of the embedding's weight, in a trial and in a step of eight microbatches."""
    config = make_config(Layout(), "bf16")
    engine, groups = build_engine(config)
    calls = []
    weight = next(engine.models[0].parameters())
    weight.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    engine.trial(microbatches(config, 0, groups))
    in_trial = len(calls)
    list(train(engine, config, groups, range(1)))
    return [in_trial, len(calls) - in_trial]
