"""What a save says of the run that wrote it, checked before anything makes use of it.

The hashes of a save find damage. Somebody who has written it by hand has made them fit, and may
have put anything into its state: text for a number, a number that no run reaches, nothing at all.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from megatron.checkpoint.load import CheckpointReader
from megatron.config import OptimizerConfig, RampupConfig, TrainConfig
from megatron.config.values import ValueMismatchError, convert
from megatron.data.history import Phase
from megatron.errors import CheckpointError, ConfigError
from megatron.optim.schedule import batch_plan
from megatron.plain import PlainDataError, check_plain
from megatron.training.progress import Progress

_SCHEDULE = ("lr", "min_lr", "decay", "warmup_samples", "decay_samples")
_MOST = 2**40
"""More samples, tokens in a sample, or steps than any run has."""
_MOST_STEPS = 10**8
"""Of a run; they are counted one by one."""


@dataclass(frozen=True)
class SavedRun:
    """A save to go on from.

    Attributes:
        reader: for its weights and moments, and for what parts of the run keep in its state.
        progress: that it was made at.
        phases: how the samples of its run are read.
        seq_length: tokens in a sample.
        train: the length and the batches of its run; the other options are as by default.
        optimizer: the schedule of its run, likewise.
        engine: what the engine counts.
    """

    reader: CheckpointReader
    progress: Progress
    phases: list[Phase]
    seq_length: int
    train: TrainConfig
    optimizer: OptimizerConfig
    engine: Mapping[str, float]

    @property
    def path(self) -> Path:
        return self.reader.path


def read_saved_run(reader: CheckpointReader) -> SavedRun:
    """What the state and the config of a save say.

    Raises:
        CheckpointError: if they are not those of a run, naming the field, its value and the rule.
    """
    state, config = reader.state, reader.config
    try:
        for name, value in (("state", state), ("config", config)):
            _check_plain(name, value)
        sections = {name: _section(config, name) for name in ("model", "train", "optimizer")}
        # Others are compared, by name.
        _section(config, "data")
        seq_length = _count("config.model.seq_length", sections["model"].get("seq_length"))
        train = _train(sections["train"])
        return SavedRun(
            reader=reader,
            progress=_progress(state, seq_length),
            phases=_phases(state, seq_length, train),
            seq_length=seq_length,
            train=train,
            optimizer=OptimizerConfig(
                **_values(OptimizerConfig, "optimizer", sections["optimizer"], _SCHEDULE)
            ),
            engine=_engine(state.get("engine")),
        )
    except (PlainDataError, ConfigError) as error:
        raise CheckpointError(f"{reader.path}: {error}", on_every_rank=True) from error


def _check_plain(name: str, value: Any) -> None:
    try:
        check_plain(value)
    except PlainDataError as error:
        raise PlainDataError(f"its {name} {error}") from error


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise PlainDataError(f"config.{name} must be a section, found {section!r:.60}")
    return section


def _train(section: Mapping[str, Any]) -> TrainConfig:
    rampup = section.get("rampup")
    if not isinstance(rampup, Mapping):
        raise PlainDataError(f"config.train.rampup must be a section, found {rampup!r:.60}")
    names = ("start", "increment", "samples")
    return TrainConfig(
        **_values(TrainConfig, "train", section, ("samples", "global_batch_size")),
        rampup=RampupConfig(**_values(RampupConfig, "train.rampup", rampup, names)),
    )


def _values(
    config: type, place: str, section: Mapping[str, Any], names: tuple[str, ...]
) -> dict[str, Any]:
    hints, values = get_type_hints(config), {}
    for name in names:
        try:
            values[name] = convert(hints[name], section[name])
        except KeyError as error:
            raise PlainDataError(f"config.{place}.{name} is missing") from error
        except ValueMismatchError as error:
            raise PlainDataError(f"config.{place}.{name} cannot be {error!s:.60}") from error
    return values


def _progress(state: Mapping[str, Any], seq_length: int) -> Progress:
    step = _count("step", state.get("step"), _MOST_STEPS)
    samples = _count("consumed_samples", state.get("consumed_samples"))
    # Until there was this field, all samples of a run were of one length.
    tokens = state.get("consumed_tokens", samples * seq_length)
    return Progress(step, samples, _count("consumed_tokens", tokens, 2**62))


def _phases(state: Mapping[str, Any], seq_length: int, train: TrainConfig) -> list[Phase]:
    if "phases" not in state:
        if train.samples // next(train.batch_sizes()) > _MOST_STEPS:
            raise PlainDataError(f"config.train.samples are {train.samples}, more than of any run")
        # The order was made for the batches that fit into the run.
        return [Phase(0, seq_length, sum(batch_plan(train)))]
    saved = state["phases"]
    if not isinstance(saved, list) or not saved:
        raise PlainDataError(f"phases must be a list, not empty, found {saved!r:.60}")
    return [_phase(values) for values in saved]


def _phase(values: Any) -> Phase:
    if not isinstance(values, Mapping):
        raise PlainDataError(f"phases must hold mappings, found {values!r:.60}")
    names = ("first", "seq_length", "num_samples")
    return Phase(**{name: _count(f"phases.{name}", values.get(name)) for name in names})


def _engine(engine: Any) -> Mapping[str, float]:
    if not isinstance(engine, Mapping):
        raise PlainDataError(f"engine must be a mapping of numbers, found {engine!r:.60}")
    _count("engine.updates", _whole(engine.get("updates")))
    if "loss_scale" in engine:
        scale = engine["loss_scale"]
        if type(scale) not in (int, float) or not 0 < scale < math.inf:
            raise PlainDataError(
                f"engine.loss_scale must be above 0 and finite, found {scale!r:.60}"
            )
        for name in ("good_steps", "patience"):
            _count(f"engine.{name}", _whole(engine.get(name)))
    return engine


def _whole(value: Any) -> Any:
    """An engine counts in floats too."""
    return int(value) if type(value) is float and value.is_integer() else value


def _count(name: str, value: Any, most: int = _MOST) -> int:
    if type(value) is not int or not 0 <= value < most:
        raise PlainDataError(f"{name} must be a whole number from 0 to {most}, found {value!r:.60}")
    return value
