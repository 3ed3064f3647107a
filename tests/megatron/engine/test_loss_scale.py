"""Training in fp16: an overflow anywhere is a step that no rank makes, and the loss scale follows.

Power of two scales do not round, so that a run which skipped a step goes on bit for bit like one
that never had it.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.config import Config, LossScaleConfig
from megatron.engine.base import Engine, StepResult
from megatron.errors import NonFiniteError
from megatron.launch import Launch
from megatron.training.progress import Progress
from megatron.training.saving import RunCheckpoints, open_newest
from mpu import ParallelGroups
from tests.distributed import run_ranks
from tests.megatron.engine.training import (
    CPU,
    DEEPSPEED_KINDS,
    Layout,
    build_any_engine,
    make_config,
    microbatches,
    spoiled,
    train,
)

INITIAL = 2.0**12
LAYOUTS = [
    Layout(),
    Layout(tensor=2, pipeline=2, data=2, sequence=True),
    Layout(pipeline=2, data=2, zero=1, schedule="zero_bubble"),
    Layout(tensor=2, data=2, zero=3),
]

# It adds gradients up in fp32 from ZeRO 1 on.
DEEPSPEED_FP16 = [layout for layout in DEEPSPEED_KINDS if layout.zero > 0]


def make_fp16(layout: Layout, *, minimum: float = 1.0) -> Config:
    """A run whose scale doubles after three good steps, and halves at the second overflow."""
    config = make_config(layout, dtype="fp16")
    scale = LossScaleConfig(initial=INITIAL, minimum=minimum, window=3, hysteresis=2)
    return replace(config, train=replace(config.train, loss_scale=scale))


def overflow(engine: Engine, config: Config, groups: ParallelGroups, factor: float) -> StepResult:
    """A step in which one microbatch of one data rank has an infinite gradient."""
    inputs = microbatches(config, 9, groups)
    if groups.data.rank() == groups.data.size() - 1:
        inputs[1] = spoiled(inputs[1], factor)
    return engine.train_step(inputs, lr=1e-2)


def copy_state(engine: Engine) -> list[Tensor]:
    return [box.tensor.clone() for state in engine.state() for box in state.boxes]


# On DeepSpeed weights are divided by their sum first, and a large one is no overflow.
OVERFLOWS = [
    *product(LAYOUTS, [1e30, torch.inf, torch.nan]),
    *product(DEEPSPEED_FP16, [torch.inf, torch.nan]),
]


@pytest.mark.parametrize(("layout", "factor"), OVERFLOWS, ids=str)
def test_no_rank_makes_a_step_that_overflows(layout: Layout, factor: float) -> None:
    ranks = run_ranks(layout.world_size, check_overflow, layout, factor)
    assert len(set(ranks)) == 1


def check_overflow(layout: Layout, factor: float) -> str:
    """All that this rank saw."""
    config = make_fp16(layout)
    engine, groups = build_any_engine(config)
    twin, twin_groups = build_any_engine(config)
    seen = [list(train(engine, config, groups, range(2)))]
    before = copy_state(engine)
    skipped = overflow(engine, config, groups, factor)
    assert skipped.skipped
    assert engine.scalars() == {
        "updates": 2,
        "loss_scale": INITIAL,
        "good_steps": 0,
        "patience": 1,
        "skipped_steps": 1,
        "skipped_in_a_row": 1,
    }
    assert (skipped.loss_scale, skipped.skipped_steps) == (INITIAL, 1)
    assert_same(copy_state(engine), before)

    # Neither the weights nor the number of steps that the moments are corrected for have moved.
    seen.append(list(train(engine, config, groups, range(2, 3))))
    made = [replace(result, skipped_steps=0) for result in seen[0] + seen[1]]
    assert made == list(train(twin, config, twin_groups, range(3)))
    assert_same(copy_state(engine), copy_state(twin))
    return f"{seen} {skipped}"


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", [*LAYOUTS[:2], *DEEPSPEED_FP16], ids=str)
def test_scale_halves_and_doubles_and_training_goes_on(layout: Layout) -> None:
    ranks = run_ranks(layout.world_size, follow_scale, layout)
    assert all(rank == ranks[0] for rank in ranks)
    updates, scales, losses = ranks[0]
    assert updates == [0, 0, 1, 2, 3, 4, 5, 6, 6, 7]
    assert scales == [
        *[INITIAL, INITIAL / 2, INITIAL / 2, INITIAL / 2, INITIAL],
        *[INITIAL, INITIAL, 2 * INITIAL, 2 * INITIAL, 2 * INITIAL],
    ]
    assert losses[-1] < losses[0]


def follow_scale(layout: Layout) -> tuple[list[float], list[float], list[float]]:
    """Updates and scale after each of ten steps, and the losses of those that were made."""
    config = make_fp16(layout)
    engine, groups = build_any_engine(config)
    updates, scales, losses = [], [], []
    for step, kind in enumerate("oo......o."):
        if kind == "o":
            assert overflow(engine, config, groups, torch.inf).skipped
        else:
            (result,) = train(engine, config, groups, range(step, step + 1))
            assert not result.skipped
            losses.append(result.loss)
        updates.append(engine.scalars()["updates"])
        scales.append(engine.scalars()["loss_scale"])
    return updates, scales, losses


@pytest.mark.parametrize("layout", [*LAYOUTS, *DEEPSPEED_FP16], ids=str)
def test_overflow_at_the_minimum_ends_every_rank(layout: Layout) -> None:
    messages = run_ranks(layout.world_size, overflow_at_minimum, layout)
    assert len(set(messages)) == 1
    assert "must be finite; the weights are as before this step" in messages[0]


def overflow_at_minimum(layout: Layout) -> str:
    config = make_fp16(layout, minimum=INITIAL)
    engine, groups = build_any_engine(config)
    list(train(engine, config, groups, range(1)))
    before = copy_state(engine)
    with pytest.raises(NonFiniteError) as caught:
        overflow(engine, config, groups, torch.inf)
    assert caught.value.on_every_rank
    assert_same(copy_state(engine), before)
    return str(caught.value)


def test_overflow_at_the_default_scale_is_followed_down() -> None:
    """As a run in fp16 begins: by skipping steps until its gradients fit."""
    run_ranks(1, follow_down)


def follow_down() -> None:
    config = make_config(Layout(), dtype="fp16")
    scale = LossScaleConfig(initial=2.0**40, hysteresis=1)
    config = replace(config, train=replace(config.train, loss_scale=scale))
    engine, groups = build_any_engine(config)
    results = list(train(engine, config, groups, range(40)))
    skipped = [result.skipped for result in results]
    first = skipped.index(False)
    assert 0 < first < 40
    assert skipped == [True] * first + [False] * (40 - first)
    assert engine.scalars()["loss_scale"] == 2.0 ** (40 - first)


def test_scale_goes_through_save_and_load(tmp_path: Path) -> None:
    run_ranks(2, save_and_load, tmp_path)


def save_and_load(folder: Path) -> None:
    """The saved run and the loaded one, on another layout's schedule, follow the same scale."""
    config = replace(make_fp16(Layout(pipeline=2)), folder=folder)
    engine, groups = build_any_engine(config)
    launch = Launch(groups.pipeline.rank(), 2, CPU, groups)
    for step in range(2):
        overflow(engine, config, groups, torch.inf)
        list(train(engine, config, groups, range(step, step + 1)))
    RunCheckpoints(config, launch, engine, None, {}).save(Progress(4, 16))

    other, other_groups = build_any_engine(config)
    assert other.scalars() != engine.scalars()
    RunCheckpoints(config, launch, other, None, {}).resume(open_newest(config))
    assert other.scalars() == engine.scalars()
    assert engine.scalars()["loss_scale"] == INITIAL / 2
    want = list(train(engine, config, groups, range(4, 8)))
    assert list(train(other, config, other_groups, range(4, 8))) == want
    assert other.scalars() == engine.scalars()
    assert engine.scalars()["loss_scale"] == INITIAL


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_save_without_a_scale_begins_with_the_initial_one(dtype: str) -> None:
    run_ranks(1, load_other_precision, dtype)


def load_other_precision(dtype: str) -> None:
    saved, _ = build_any_engine(make_config(Layout(), dtype=dtype))  # type: ignore[arg-type]
    engine, _ = build_any_engine(make_fp16(Layout()))
    engine.load_state(lambda _: None, {**saved.scalars(), "updates": 7})
    found = engine.scalars()
    assert (found["updates"], found["loss_scale"]) == (7, INITIAL)
