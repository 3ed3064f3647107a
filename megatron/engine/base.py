"""The contract of an engine: what drives forward, backward and the update of a model.

What belongs to the run and not to the engine (schedule, data order, metrics, saving) is written
once, outside, and works with any engine.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from megatron.model.inputs import ModelInputs
from mpu import ShardSpec


@dataclass(frozen=True)
class StepResult:
    """What one step tells.

    Attributes:
        loss: mean over all tokens of the step, in nats.
        grad_norm: L2 norm of the gradient of that mean, before clipping.
        skipped: the engine left the weights as they were, as a loss scaler does after an overflow.
    """

    loss: float
    grad_norm: float
    skipped: bool = False


@dataclass(frozen=True)
class NamedState:
    """One tensor of the training state, independent of the engine that holds it.

    Attributes:
        name: of the parameter that it belongs to.
        kind: "weight", "exp_avg" or "exp_avg_sq".
        spec: how the parameter is cut over the tensor axis.
        tensor: this rank's part. Writing to it changes the state.
    """

    name: str
    kind: str
    spec: ShardSpec
    tensor: Tensor


class Engine(ABC):
    """Trains one model. Every method is collective: all ranks call it, in the same order."""

    @abstractmethod
    def train_step(self, microbatches: Iterable[ModelInputs], lr: float) -> StepResult:
        """Make one update with the gradient of the mean loss over all tokens of all ranks.

        Raises:
            NonFiniteError: on every rank, before the update, if the loss or the gradient is
                infinite or not a number.
        """

    @abstractmethod
    def evaluate(self, microbatches: Iterable[ModelInputs]) -> float:
        """Mean loss over all tokens of all ranks, without dropout."""

    @abstractmethod
    def named_state(self) -> list[NamedState]:
        """Weights and optimizer state, in full precision."""

    @abstractmethod
    def state_loaded(self, step: int) -> None:
        """Take over the state that was written to ``named_state``, after ``step`` updates."""
