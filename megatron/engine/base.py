"""The contract of an engine: what drives forward, backward and the update of a model.

What belongs to the run and not to the engine (schedule, data order, metrics, saving) is written
once, outside, and works with any engine.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from megatron.errors import NonFiniteError
from megatron.model.inputs import ModelInputs
from mpu import ShardedTensor


@dataclass(frozen=True)
class StepResult:
    """What one step tells.

    Attributes:
        loss: mean over all tokens of the step, in nats.
        grad_norm: L2 norm of the gradient of that mean, before clipping.
        skipped: the weights are as they were, because a gradient under fp16 overflowed.
        loss_scale: what the loss was multiplied by; None but under fp16.
        skipped_steps: how many steps of the run have been skipped so far, with this one.
    """

    loss: float
    grad_norm: float
    skipped: bool = False
    loss_scale: float | None = None
    skipped_steps: int = 0


def non_finite_error(result: StepResult) -> NonFiniteError:
    """The error of a step that was not made, and whose loss scale cannot be lowered."""
    return NonFiniteError(
        f"loss {result.loss} and gradient norm {result.grad_norm} must be finite; "
        "the weights are as before this step",
        on_every_rank=True,
    )


Read: TypeAlias = Callable[[Sequence[ShardedTensor]], None]
"""Fills the boxes of the state, which may be copies, to be written back afterwards."""


class Engine(ABC):
    """Trains one model. Every method is collective: all ranks call it, in the same order."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model is, and every tensor that its ranks exchange."""

    @abstractmethod
    def train_step(self, microbatches: Iterable[ModelInputs], lr: float) -> StepResult:
        """Make one update with the gradient of the mean loss over all tokens of all ranks.

        Raises:
            NonFiniteError: on every rank, before the update, if the loss or the gradient is
                infinite or not a number; under fp16 only where a lower loss scale cannot help.
        """

    @abstractmethod
    def trial(self, microbatches: Iterable[ModelInputs]) -> None:
        """Go forward and backward as a step does, without its update, to see what that takes.

        Weights and optimizer state stay as they are, and no later step is changed by it.
        """

    @abstractmethod
    def evaluate(self, microbatches: Iterable[ModelInputs]) -> float:
        """Mean loss over all tokens of all ranks, without dropout."""

    @abstractmethod
    def state(self) -> list[ShardedTensor]:
        """Weights and optimizer state, in full precision."""

    @abstractmethod
    def scalars(self) -> dict[str, float]:
        """The rest of the state, the same on all ranks: at least "updates", how many were made."""

    @abstractmethod
    def load_state(self, read: Read, scalars: Mapping[str, float]) -> None:
        """Let ``read`` write to the boxes of ``state``, and take over that and ``scalars``.

        What ``read`` raises is passed on.
        """
