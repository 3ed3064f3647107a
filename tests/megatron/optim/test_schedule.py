"""Learning rate and batch size as functions of the samples consumed."""

import math
from typing import Any

import pytest

from megatron.config import OptimizerConfig, RampupConfig, TrainConfig
from megatron.optim.schedule import batch_plan, global_batch_size, learning_rate

LR, MIN_LR = 3e-4, 3e-5
WARMUP, END = 100, 1100
TRAIN = 5000


def rate(samples: int, **changes: Any) -> float:
    config = {"lr": LR, "min_lr": MIN_LR, "warmup_samples": WARMUP, "decay_samples": END}
    return learning_rate(samples, OptimizerConfig(**{**config, **changes}), TRAIN)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_warmup_rises_in_proportion_to_the_samples(decay: str) -> None:
    rates = [rate(samples, decay=decay) for samples in (1, 25, 50, 100)]
    assert rates == [LR * 1 / 100, LR * 25 / 100, LR * 50 / 100, LR]


def test_constant_stays() -> None:
    assert [rate(samples, decay="constant") for samples in (101, END, 10**9)] == [LR] * 3


@pytest.mark.parametrize("share", [0.001, 0.25, 0.5, 0.999])
def test_linear_falls_in_proportion_to_the_share_that_is_done(share: float) -> None:
    samples = WARMUP + round(share * (END - WARMUP))
    assert rate(samples, decay="linear") == MIN_LR + (LR - MIN_LR) * (1 - share)


@pytest.mark.parametrize("share", [0.001, 0.25, 0.5, 0.999])
def test_cosine_falls_by_half_a_wave(share: float) -> None:
    samples = WARMUP + round(share * (END - WARMUP))
    expected = MIN_LR + (LR - MIN_LR) * (math.cos(math.pi * share) + 1) / 2
    assert rate(samples, decay="cosine") == expected


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_lowest_rate_is_reached_at_the_end_and_kept(decay: str) -> None:
    assert rate(END - 1, decay=decay) > MIN_LR
    assert [rate(samples, decay=decay) for samples in (END, END + 1, 10**9)] == [MIN_LR] * 3


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay_lasts_as_long_as_the_run_unless_told(decay: str) -> None:
    assert rate(TRAIN - 1, decay=decay, decay_samples=None) > MIN_LR
    assert rate(TRAIN, decay=decay, decay_samples=None) == MIN_LR


def test_inverse_sqrt_falls_for_ever_but_not_below_the_lowest() -> None:
    assert rate(4 * WARMUP, decay="inverse_sqrt") == LR / 2
    assert rate(25 * WARMUP, decay="inverse_sqrt") == LR / 5
    assert rate(10**9, decay="inverse_sqrt") == MIN_LR


def test_without_warmup_the_first_step_has_the_whole_rate() -> None:
    assert rate(1, decay="constant", warmup_samples=0) == LR
    assert rate(1, decay="inverse_sqrt", warmup_samples=0) == LR


def bloom() -> TrainConfig:
    """The batches of BLOOM 176B."""
    return TrainConfig(
        samples=220_000_000,
        global_batch_size=2048,
        rampup=RampupConfig(start=192, increment=16, samples=9_765_625),
    )


def test_ramp_up_of_bloom_has_116_increments() -> None:
    config = bloom()
    sizes = list(config.batch_sizes())
    assert sizes == list(range(192, 2049, 16))
    assert len(sizes) - 1 == 116
    # 9,765,625 / 116 = 84,186.4 samples for each.
    assert global_batch_size(0, config) == 192
    assert global_batch_size(84_186, config) == 192
    assert global_batch_size(84_187, config) == 208
    assert global_batch_size(2 * 84_187, config) == 224
    assert global_batch_size(9_765_624, config) == 2032
    assert global_batch_size(9_765_626, config) == 2048


def test_plan_takes_every_size_once_or_more_and_in_order() -> None:
    config = bloom()
    plan = list(batch_plan(config))
    assert plan == sorted(plan)
    assert set(plan) == set(config.batch_sizes())
    assert plan[:440] == [192] * 439 + [208]


@pytest.mark.parametrize("samples", [10, 11, 12, 19, 20, 37, 100])
@pytest.mark.parametrize("rampup", [(0, 0, 0), (2, 4, 30), (10, 5, 30), (2, 8, 1)])
def test_plan_never_goes_beyond_the_samples(samples: int, rampup: tuple[int, int, int]) -> None:
    start, increment, over = rampup
    config = TrainConfig(
        samples=samples,
        global_batch_size=10,
        rampup=RampupConfig(start=start, increment=increment, samples=over),
    )
    consumed = sum(batch_plan(config))
    assert consumed <= samples < consumed + global_batch_size(consumed, config)


def test_batch_is_constant_without_ramp_up() -> None:
    config = TrainConfig(samples=45, global_batch_size=10)
    assert list(batch_plan(config)) == [10] * 4


def test_ramp_up_from_the_full_size_is_none() -> None:
    rampup = RampupConfig(start=10, increment=5, samples=30)
    config = TrainConfig(samples=45, global_batch_size=10, rampup=rampup)
    assert list(batch_plan(config)) == [10] * 4
