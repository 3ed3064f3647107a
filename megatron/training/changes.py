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
from typing import Any

from megatron.config import Config, config_to_dict
from megatron.data.history import Phase, go_on
from megatron.errors import CheckpointError
from megatron.optim.schedule import global_batch_size, learning_rate
from megatron.training.saved_run import SavedRun

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
_JUMP = 0.01
"""Relative change of the learning rate that is told of."""


def check_changes(config: Config, save: SavedRun) -> None:
    """Refuse another model than that of ``save``; tell of every other option that has changed.

    Raises:
        CheckpointError: for another model.
    """
    values = config_to_dict(config)
    for section in ("model", "train", "data", "optimizer"):
        saved = save.reader.config[section]
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
    _tell_of_jump(config, save)


def run_phases(config: Config, save: SavedRun | None, *, same_data: bool) -> list[Phase]:
    """How the samples of a run are read that goes on from ``save``, or begins.

    Args:
        same_data: whether the data is that of the save.
    """
    before = [] if save is None else save.phases
    consumed = 0 if save is None else save.progress.consumed_samples
    # A run that is complete has no next batch, but its parts are made with one.
    samples = max(config.train.samples, consumed + global_batch_size(consumed, config.train))
    return go_on(before, consumed, config.model.seq_length, samples, same_data=same_data)


def saved_choices(config: Config, save: SavedRun | None) -> Mapping[str, Any]:
    """The state of ``save``, for what a run chooses by measuring and then keeps.

    Nothing, if it was measured with samples of another length.
    """
    if save is None or save.seq_length != config.model.seq_length:
        return {}
    return save.reader.state


def _able_to_differ(config: Config) -> tuple[str, ...]:
    learned = config.model.position_embedding == "learned"
    return _MAY_DIFFER if learned else (*_MAY_DIFFER, "seq_length")


def _tell_of_jump(config: Config, save: SavedRun) -> None:
    consumed = save.progress.consumed_samples
    samples = consumed + global_batch_size(consumed, config.train)
    before = learning_rate(samples, save.optimizer, save.train.samples)
    now = learning_rate(samples, config.optimizer, config.train.samples)
    if abs(now - before) > _JUMP * max(now, before):
        logger.warning(
            "the learning rate of step %d is %.3g, but would be %.3g with optimizer and "
            "train.samples as at the save",
            save.progress.step + 1,
            now,
            before,
        )
