"""The loss scale halves when gradients overflow, and doubles when they have not for long."""

import json

import pytest

from megatron.config import LossScaleConfig
from megatron.errors import ConfigError
from megatron.optim.loss_scaler import LossScaler, only_skips

CONFIG = LossScaleConfig(initial=64.0, minimum=8.0, window=3, hysteresis=2)


def scales(scaler: LossScaler, steps: str) -> list[float]:
    """The scale after each step, ``o`` of an overflow and ``.`` of another."""
    found = []
    for step in steps:
        scaler.update(overflow=step == "o")
        found.append(scaler.scale)
    return found


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        # Doubles after each window without overflow.
        ("......", [64, 64, 128, 128, 128, 256]),
        # An overflow begins the window anew.
        ("..o...", [64, 64, 64, 64, 64, 128]),
        # The first overflow is forgiven, each further one halves.
        ("ooo", [64, 32, 16]),
        # Steps between overflows forgive nothing, unless they are enough to double.
        ("o.o.o", [64, 64, 32, 32, 16]),
        ("o...oo", [64, 64, 64, 128, 128, 64]),
        # Not below the minimum.
        ("oooooo", [64, 32, 16, 8, 8, 8]),
    ],
)
def test_scale_follows_the_steps(steps: str, expected: list[float]) -> None:
    assert scales(LossScaler(CONFIG), steps) == expected


def test_hysteresis_of_one_forgives_nothing() -> None:
    config = LossScaleConfig(initial=64.0, window=3, hysteresis=1)
    assert scales(LossScaler(config), "oo") == [32, 16]


def test_minimum_that_is_no_half_is_reached() -> None:
    config = LossScaleConfig(initial=10.0, minimum=7.0, hysteresis=1)
    scaler = LossScaler(config)
    assert scales(scaler, "o") == [7]
    assert scaler.is_least


def test_only_the_minimum_is_least() -> None:
    scaler = LossScaler(CONFIG)
    found = []
    for _ in range(4):
        found.append(scaler.is_least)
        scaler.update(overflow=True)
    assert found == [False, False, False, False]
    assert scaler.is_least


@pytest.mark.parametrize("before", ["", ".", "o", "oo.", "..o.", "...oo"])
def test_state_goes_on_where_it_was_saved(before: str) -> None:
    scaler = LossScaler(CONFIG)
    scales(scaler, before)
    other = LossScaler(LossScaleConfig(initial=4096.0, minimum=8.0, window=3, hysteresis=2))
    other.load(json.loads(json.dumps(scaler.state())))
    assert other.scale == scaler.scale
    assert scales(other, "..o.oo...") == scales(scaler, "..o.oo...")
    assert other.state() == scaler.state()


def test_saves_that_count_no_skipped_steps_are_read() -> None:
    scaler = LossScaler(CONFIG)
    scales(scaler, "oo.o")
    assert scaler.skipped == 3
    scaler.load({"loss_scale": 32.0, "good_steps": 1, "patience": 2})
    assert (scaler.scale, scaler.skipped) == (32.0, 0)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("", False),
        (".", False),
        # Nothing but skipped steps, from the first one on.
        ("o", True),
        ("ooo", True),
        # What a scale that has just doubled, or a single spike, may bring about.
        (".oooo", False),
        ("...oooo", False),
        (".ooooo.", False),
        (".ooooo", True),
        (".o.o.o.o.o.o", False),
    ],
)
def test_skipping_only_is_told_from_finding_the_scale(steps: str, expected: bool) -> None:
    scaler = LossScaler(CONFIG)
    scales(scaler, steps)
    scalars = {"updates": steps.count("."), **scaler.state()}
    assert only_skips(scalars, CONFIG) is expected


def test_without_a_scale_nothing_is_skipped() -> None:
    assert not only_skips({"updates": 0}, CONFIG)


@pytest.mark.parametrize("option", ["initial", "minimum", "window", "hysteresis"])
def test_options_must_be_above_zero(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"train.loss_scale.{option} must be greater than 0"):
        LossScaleConfig(**{option: 0})


def test_minimum_above_the_initial_scale_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"minimum \(4.0\) must not be above .*initial \(2.0\)"):
        LossScaleConfig(initial=2.0, minimum=4.0)
