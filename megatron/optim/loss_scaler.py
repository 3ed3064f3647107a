"""The dynamic loss scale of fp16 (Micikevicius et al. 2018)."""

from collections.abc import Mapping

from megatron.config import LossScaleConfig


class LossScaler:
    """What the loss is multiplied by, and how it follows overflows.

    Attributes:
        scale: a power of two times the initial scale, so that scaling does not round.
    """

    def __init__(self, config: LossScaleConfig) -> None:
        self._config = config
        self.scale = config.initial
        self._good_steps = 0
        self._patience = config.hysteresis

    @property
    def is_least(self) -> bool:
        """Whether an overflow could not lower the scale any more."""
        return self.scale <= self._config.minimum

    def update(self, overflow: bool) -> None:
        """Follow a step, in which a gradient was or was not finite."""
        if overflow:
            self._good_steps = 0
            self._patience = max(0, self._patience - 1)
            if self._patience == 0:
                self.scale = max(self.scale / 2, self._config.minimum)
            return
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
        }

    def load(self, state: Mapping[str, float]) -> None:
        self.scale = float(state["loss_scale"])
        self._good_steps = int(state["good_steps"])
        self._patience = int(state["patience"])
