"""The dynamic loss scale of fp16 (Micikevicius et al. 2018).

A step that overflows is skipped. That is nothing unusual where a run begins, with a scale that is
too high on purpose, and after the scale has doubled. ``only_skips`` tells it from a run that has
come to do nothing else.
"""

from collections.abc import Mapping

from megatron.config import LossScaleConfig

_IN_A_ROW = "skipped_in_a_row"

_MORE = 2
"""Overflows in a row, besides those that are forgiven, that may be in order. One more halves the
scale for the fourth time, and the first time took back that it doubled."""


class LossScaler:
    """What the loss is multiplied by, and how it follows overflows.

    Attributes:
        scale: a power of two times the initial scale, so that scaling does not round.
        skipped: steps of the run so far that overflowed.
    """

    def __init__(self, config: LossScaleConfig) -> None:
        self._config = config
        self.scale = config.initial
        self.skipped = 0
        self._in_a_row = 0
        self._good_steps = 0
        self._patience = config.hysteresis

    @property
    def is_least(self) -> bool:
        """Whether an overflow could not lower the scale any more."""
        return self.scale <= self._config.minimum

    def update(self, overflow: bool) -> None:
        """Follow a step, in which a gradient was or was not finite."""
        if overflow:
            self.skipped += 1
            self._in_a_row += 1
            self._good_steps = 0
            self._patience = max(0, self._patience - 1)
            if self._patience == 0:
                self.scale = max(self.scale / 2, self._config.minimum)
            return
        self._in_a_row = 0
        self._good_steps += 1
        if self._good_steps == self._config.window:
            self._good_steps = 0
            self._patience = self._config.hysteresis
            self.scale *= 2

    def state(self) -> dict[str, float]:
        """What ``load`` needs to go on from here."""
        return {
            "loss_scale": self.scale,
            "good_steps": self._good_steps,
            "patience": self._patience,
            "skipped_steps": self.skipped,
            _IN_A_ROW: self._in_a_row,
        }

    def load(self, state: Mapping[str, float]) -> None:
        self.scale = float(state["loss_scale"])
        self._good_steps = int(state["good_steps"])
        self._patience = int(state["patience"])
        # Saves of earlier versions do not count them.
        self.skipped = int(state.get("skipped_steps", 0))
        self._in_a_row = int(state.get(_IN_A_ROW, 0))


def only_skips(scalars: Mapping[str, float], config: LossScaleConfig) -> bool:
    """Whether nothing came of the last steps of a run.

    They overflowed: all of them since the run began, or so many in a row that the scale is down to
    an eighth of one that was right before.

    Args:
        scalars: what an engine tells; without a loss scale no step is skipped.
    """
    in_a_row = scalars.get(_IN_A_ROW, 0)
    never_updated = in_a_row > 0 and scalars["updates"] == 0
    return never_updated or in_a_row > config.hysteresis + _MORE
