"""Whether what a save says of its run can be gone on from, before anything makes use of it.

The hashes of a save find damage. Somebody who has written it by hand has made them fit, and may
have put anything into its state: text for a number, a number that no run reaches, nothing at all.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.errors import CheckpointError
from megatron.plain import PlainDataError, check_plain

_SECTIONS = ("model", "train", "data", "optimizer")
_MOST = 2**40
"""More samples, tokens in a sample, or steps than any run has."""
_MOST_STEPS = 10**8
"""Of a run; they are counted one by one."""


def check_saved(path: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse the state and the config of the save ``path`` if they are not those of a run.

    Raises:
        CheckpointError: naming the field, its value and the rule.
    """
    try:
        for name, value in (("state", state), ("config", config)):
            _check_plain(name, value)
        _check_progress(state)
        _check_engine(state.get("engine"))
        _check_phases(state)
        for name in _SECTIONS:
            if not isinstance(config.get(name), Mapping):
                raise PlainDataError(
                    f"config.{name} must be a section, found {config.get(name)!r:.60}"
                )
        if "phases" not in state:
            _check_plan(config["train"])
    except PlainDataError as error:
        raise CheckpointError(f"{path}: {error}", on_every_rank=True) from error


def _check_plain(name: str, value: Any) -> None:
    try:
        check_plain(value)
    except PlainDataError as error:
        raise PlainDataError(f"its {name} {error}") from error


def _check_progress(state: Mapping[str, Any]) -> None:
    _check_count("step", state.get("step"), _MOST_STEPS)
    _check_count("consumed_samples", state.get("consumed_samples"))
    if "consumed_tokens" in state:
        _check_count("consumed_tokens", state["consumed_tokens"], 2**62)


def _check_engine(engine: Any) -> None:
    if not isinstance(engine, Mapping):
        raise PlainDataError(f"engine must be a mapping of numbers, found {engine!r:.60}")
    _check_count("engine.updates", _whole(engine.get("updates")))
    if "loss_scale" not in engine:
        return
    scale = engine["loss_scale"]
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise PlainDataError(f"engine.loss_scale must be above 0 and finite, found {scale!r:.60}")
    for name in ("good_steps", "patience"):
        _check_count(f"engine.{name}", _whole(engine.get(name)))


def _whole(value: Any) -> Any:
    """An engine counts in floats too."""
    return int(value) if type(value) is float and value.is_integer() else value


def _check_phases(state: Mapping[str, Any]) -> None:
    phases = state.get("phases", [])
    if not isinstance(phases, list):
        raise PlainDataError(f"phases must be a list, found {phases!r:.60}")
    for phase in phases:
        if not isinstance(phase, Mapping):
            raise PlainDataError(f"phases must hold mappings, found {phase!r:.60}")
        for name, value in phase.items():
            _check_count(f"phases.{name}", value)


def _check_plan(train: Mapping[str, Any]) -> None:
    samples = _check_count("config.train.samples", train.get("samples"))
    batch = _check_count("config.train.global_batch_size", train.get("global_batch_size"))
    if batch == 0 or samples // batch > _MOST_STEPS:
        raise PlainDataError(f"config.train has {samples} samples in batches of {batch}")


def _check_count(name: str, value: Any, most: int = _MOST) -> int:
    if type(value) is not int or not 0 <= value < most:
        raise PlainDataError(f"{name} must be a whole number from 0 to {most}, found {value!r:.60}")
    return value
