"""What may differ between a save and the run that goes on from it, and what follows from that.

another model                       refused, naming the option
another length of the samples       taken where no weight depends on it; what is left of the
                                    data is cut anew (``megatron.data.history``)
more samples, another batch         taken; the order of the data is kept
another rate for the next step      taken, with a warning
anything else                       taken, and told
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.checkpoint.load import CheckpointReader
from megatron.config import Config, OptimizerConfig, RampupConfig, TrainConfig, config_to_dict
from megatron.data.history import Phase, go_on
from megatron.errors import CheckpointError
from megatron.optim.schedule import batch_plan, global_batch_size, learning_rate
from megatron.training.progress import Progress

logger = logging.getLogger(__name__)

# Of the options of the model, those that no weight depends on.
_MAY_DIFFER = (
    "attention_backend",
    "attention_dropout",
    "hidden_dropout",
    "init_std",
    "layernorm",
    "vocab_padding_multiple",
)
_OF_RATE = ("lr", "min_lr", "decay", "warmup_samples", "decay_samples")
_JUMP = 0.01
"""Relative change of the learning rate that is told of."""


def check_changes(config: Config, save: CheckpointReader, progress: Progress) -> None:
    """Refuse another model than that of ``save``; tell of every other option that has changed.

    Raises:
        CheckpointError: for another model.
    """
    values = config_to_dict(config)
    for section in ("model", "train", "data", "optimizer"):
        saved = save.config.get(section, {})
        for name, value in values[section].items():
            before = saved.get(name)
            if before == value:
                continue
            if section == "model" and name not in _able_to_differ(config):
                raise CheckpointError(
                    f"model.{name} is {value}, but {before} in {save.path}: not the same model",
                    on_every_rank=True,
                )
            logger.info("%s.%s is now %s, and was %s at the save", section, name, value, before)
    _tell_of_jump(config, save, progress)


def run_phases(config: Config, save: CheckpointReader | None, *, same_data: bool) -> list[Phase]:
    """How the samples of a run are read that goes on from ``save``, or begins.

    Args:
        same_data: whether the data is that of the save.

    Raises:
        CheckpointError: if the save does not say how they were read before.
    """
    before, consumed = [], 0
    if save is not None:
        before, consumed = _saved_phases(config, save), read_progress(save).consumed_samples
    # A run that is complete has no next batch, but its parts are made with one.
    samples = max(config.train.samples, consumed + global_batch_size(consumed, config.train))
    return go_on(before, consumed, config.model.seq_length, samples, same_data=same_data)


def saved_choices(config: Config, save: CheckpointReader | None) -> Mapping[str, Any]:
    """The state of ``save``, for what a run chooses by measuring and then keeps.

    Nothing, if it was measured with samples of another length.
    """
    length = config.model.seq_length
    if save is None or save.config.get("model", {}).get("seq_length") != length:
        return {}
    return save.state


def read_progress(save: CheckpointReader) -> Progress:
    """The progress that ``save`` was made at.

    Raises:
        CheckpointError: if the save does not say it.
    """
    step, samples = (_count(save, save.state, name) for name in ("step", "consumed_samples"))
    if "consumed_tokens" in save.state:
        return Progress(step, samples, _count(save, save.state, "consumed_tokens"))
    # Until there was this field, all samples of a run were of one length.
    return Progress(step, samples, samples * _count(save, save.config.get("model"), "seq_length"))


def _able_to_differ(config: Config) -> tuple[str, ...]:
    learned = config.model.position_embedding == "learned"
    return _MAY_DIFFER if learned else (*_MAY_DIFFER, "seq_length")


def _saved_phases(config: Config, save: CheckpointReader) -> list[Phase]:
    if "phases" not in save.state:
        # The order was made for the batches that fit into the run.
        length = _count(save, save.config.get("model"), "seq_length")
        return [Phase(0, length, sum(batch_plan(_saved_train(config, save))))]
    saved = save.state["phases"]
    if not isinstance(saved, list) or not saved:
        raise CheckpointError(f"{save.path}: phases must be a list, found {saved!r:.60}")
    names = ("first", "seq_length", "num_samples")
    return [Phase(**{name: _count(save, phase, name) for name in names}) for phase in saved]


def _tell_of_jump(config: Config, save: CheckpointReader, progress: Progress) -> None:
    consumed = progress.consumed_samples
    samples = consumed + global_batch_size(consumed, config.train)
    optimizer, train = _saved_optimizer(config, save), _saved_train(config, save)
    before = learning_rate(samples, optimizer, train.samples)
    now = learning_rate(samples, config.optimizer, config.train.samples)
    if abs(now - before) > _JUMP * max(now, before):
        logger.warning(
            "the learning rate of step %d is %.3g, but would be %.3g with optimizer and "
            "train.samples as at the save",
            progress.step + 1,
            now,
            before,
        )


def _saved_train(config: Config, save: CheckpointReader) -> TrainConfig:
    """``config.train`` with the length and the batches of the run that wrote ``save``."""
    try:
        saved = save.config["train"]
        return replace(
            config.train,
            samples=saved["samples"],
            global_batch_size=saved["global_batch_size"],
            rampup=RampupConfig(**saved["rampup"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(save, "train", error) from error


def _saved_optimizer(config: Config, save: CheckpointReader) -> OptimizerConfig:
    """``config.optimizer`` with the schedule of the run that wrote ``save``."""
    try:
        saved = save.config["optimizer"]
        return replace(config.optimizer, **{name: saved[name] for name in _OF_RATE})
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(save, "optimizer", error) from error


def _count(save: CheckpointReader, values: Any, name: str) -> int:
    value = values.get(name) if isinstance(values, Mapping) else None
    if type(value) is not int or value < 0:
        raise CheckpointError(
            f"{save.path}: {name} must be a whole number, not negative, found {value!r:.60}",
            on_every_rank=True,
        )
    return value


def _unreadable(save: CheckpointReader, section: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{save.path}: the section {section} of its config cannot be read: {error!r:.200}",
        on_every_rank=True,
    )
