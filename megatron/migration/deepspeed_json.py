"""DeepSpeed's JSON: what of it options of this project decide, and what is handed on as it is.

Names are dotted, as in ``zero_optimization.stage``. The values of those in ``SAME`` become options,
which the flags may repeat but not contradict. What is left goes to ``engine.deepspeed``, if the
config takes it there.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config.dotted import flatten
from megatron.errors import ConfigError
from megatron.migration.shell import open_parts, shown
from megatron.migration.values import Flags, Notes, Settings, about_open
from megatron.plain import PlainDataError, check_plain
from megatron.plain import parse_json as parse_plain

AUTO = "auto"


@dataclass(frozen=True)
class Same:
    """Its value, converted, is that of an option."""

    option: str
    convert: Callable[[Any], Any]


SAME: dict[str, Same] = {
    "train_batch_size": Same("train.global_batch_size", int),
    "train_micro_batch_size_per_gpu": Same("train.micro_batch_size", int),
    "gradient_clipping": Same("optimizer.max_grad_norm", float),
    "zero_optimization.stage": Same("parallel.zero", int),
    "fp16.initial_scale_power": Same("train.loss_scale.initial", lambda power: 2.0**power),
    "fp16.loss_scale_window": Same("train.loss_scale.window", int),
    "fp16.hysteresis": Same("train.loss_scale.hysteresis", int),
    "fp16.min_loss_scale": Same("train.loss_scale.minimum", float),
    "optimizer.params.lr": Same("optimizer.lr", float),
    "optimizer.params.eps": Same("optimizer.eps", float),
    "optimizer.params.weight_decay": Same("optimizer.weight_decay", float),
}
_PRECISIONS = {"bf16.enabled": "bf16", "bfloat16.enabled": "bf16", "fp16.enabled": "fp16"}
_ADAM = ("adam", "adamw")
_BATCH = "gradient_accumulation_steps"


@dataclass(frozen=True)
class DeepSpeedJson:
    """The values of the JSON by dotted names, and what its file is called."""

    place: str
    values: Mapping[str, Any]

    @property
    def accumulation(self) -> int | None:
        """Microbatches of a data rank in one step, where that is said."""
        steps = self.values.get(_BATCH, AUTO)
        return None if steps == AUTO else int(steps)

    def source(self, name: str) -> str:
        """How a value is named in messages."""
        return f"{name} {json.dumps(self.values[name])} of {self.place}"


def parse_json(text: str, place: str) -> DeepSpeedJson:
    """Read DeepSpeed's JSON.

    Raises:
        ConfigError: if it is no JSON object, or something in it is open.
    """
    for part in open_parts(text):
        raise ConfigError(f"{shown(place)}: {about_open(part)}; or the file with --deepspeed")
    try:
        values = parse_plain(text)
        check_plain(values)
    except PlainDataError as error:
        raise ConfigError(f"{shown(place)} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{shown(place)} must be a JSON object, got {text.strip():.40}")
    return DeepSpeedJson(shown(place), dict(flatten(values)))


def take_settings(
    given: DeepSpeedJson, flags: Flags, settings: Settings, notes: Notes
) -> dict[str, Any]:
    """Give ``settings`` what the JSON decides; return what is left, by dotted names.

    Raises:
        ConfigError: if the flags say something else.
    """
    left = {}
    for name, value in given.values.items():
        if value == AUTO:
            notes.add("lost", f'{name} "auto"', _about_auto(name))
        elif name in SAME:
            _take_same(given, name, settings)
        elif name in _PRECISIONS:
            _take_precision(given, name, flags, settings)
        elif name == "optimizer.params.betas":
            for option, beta in zip(("optimizer.beta1", "optimizer.beta2"), value, strict=True):
                settings.give(option, beta, given.source(name))
        elif not _is_decided(name, value):
            left[name] = value
    return left


def _take_same(given: DeepSpeedJson, name: str, settings: Settings) -> None:
    same = SAME[name]
    try:
        value = same.convert(given.values[name])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{given.source(name)} must be a number") from error
    settings.give(same.option, value, given.source(name))


def _take_precision(given: DeepSpeedJson, name: str, flags: Flags, settings: Settings) -> None:
    dtype = _PRECISIONS[name]
    if given.values[name]:
        settings.give("train.dtype", dtype, given.source(name))
    elif dtype in flags:
        raise ConfigError(f"--{dtype} contradicts {given.source(name)}; make them agree")


def _is_decided(name: str, value: Any) -> bool:
    """Whether a value is what a run does anyway, or is checked elsewhere."""
    return (
        name == _BATCH
        or (name == "fp16.loss_scale" and value == 0)
        or (name == "optimizer.type" and str(value).lower() in _ADAM)
    )


def _about_auto(name: str) -> str:
    decides = f"{SAME[name].option} decides" if name in SAME else "DeepSpeed's default holds"
    return f"only the Trainer of transformers fills it in; {decides}"
