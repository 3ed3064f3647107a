"""The loss scale of this project in the place of DeepSpeed's.

So it is the same on both engines, also in a run that changes them. DeepSpeed's own waits one step
longer before it doubles for the first time; and it changes in the middle of a step, before the
gradients are divided by it, so that every step at which it doubles makes half of an update.
"""

from torch import Tensor

from megatron.config import LossScaleConfig
from megatron.optim.loss_scaler import LossScaler


class DeepSpeedLossScaler(LossScaler):
    """``LossScaler`` with what DeepSpeed's optimizers ask of one.

    Attributes:
        cur_scale: that of this step, until the next one begins.
    """

    dynamic = True

    def __init__(self, config: LossScaleConfig) -> None:
        super().__init__(config)
        self.cur_scale = self.scale

    def begin_step(self) -> None:
        self.cur_scale = self.scale

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss * self.cur_scale

    def update_scale(self, overflow: bool) -> None:
        self.update(overflow)
