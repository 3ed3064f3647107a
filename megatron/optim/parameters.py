"""What an optimizer updates: the contract between engine, optimizer and how weights are kept.

    parallel.zero   kept by              whole on every data rank        cut over the data ranks
    0               FlatParameters       weights, gradients, state
    1               FlatParameters       weights, gradients              state
    2               ShardedParameters    weights, during a step          gradients, state
    3               ShardedParameters    a layer's weights, in use       weights, gradients, state

The optimizer updates *main* parameters in fp32 (fp64 in a run of that precision). They are
stretches of storage, cut where it suits the keeper; ``held`` tells which boxes of which logical
parameter lie in them. The model computes with weights of its own precision, which follow by
``sync_weights``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpu import ParallelGroups, ShardedTensor

Fill: TypeAlias = Callable[[str, nn.Parameter], None]
"""Gives this rank's part of the parameter of that name its value."""

_CPU_ELEMENTS = 2**16
"""Elements of a gradient whose squares are summed up at once on a CPU, which converts them first:
bounds the memory besides the gradients."""

_GPU_ELEMENTS = 2**24
"""The same on a GPU, whose kernel converts each element as it reads it."""


def square_sum(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """Sum of the squares of all elements on this rank, a float64 scalar.

    All of it is computed in float64. In float32 squares overflow from 1e19 on, and a CPU, which
    adds up one long row, is wrong by 6e-4 of the sum of 2^24 elements: by another part of it
    wherever the gradient is cut in another way.
    """
    most = _CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS
    parts = [part for grad in gradients for part in grad.reshape(-1).split(most)]
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(parts, 2, torch.float64)).square().sum()


class Parameters(ABC):
    """The parameters of the stages on this rank. All methods that communicate are collective."""

    def __init__(self, groups: ParallelGroups) -> None:
        self._groups = groups

    @abstractmethod
    def initialise(self, fill: Fill) -> None:
        """Set main parameters and weights to what ``fill`` gives."""

    @abstractmethod
    def main(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The main parameters with and without weight decay, each with its gradient."""

    @abstractmethod
    def state(self, kind: str, of: Callable[[nn.Parameter], Tensor]) -> Iterator[ShardedTensor]:
        """What this rank holds of the state of that kind, which is what ``of`` gives for each main
        parameter, of its shape."""

    @abstractmethod
    def zero_gradients(self) -> None:
        """Begin a step."""

    @abstractmethod
    def reduce_gradients(self) -> None:
        """Sum the gradients over the data ranks, and over other ranks what they hold parts of."""

    @abstractmethod
    def sync_weights(self) -> None:
        """Let the model compute with the main parameters as they are now."""

    @abstractmethod
    def _counted(self) -> list[Tensor]:
        """The gradients of this rank that count for the norm: each logical element on one rank."""

    def scale_gradients(self, factor: Tensor) -> None:
        decayed, others = self.main()
        gradients = [p.grad for p in (*decayed, *others) if p.grad is not None]
        # With more data ranks than rows, one may hold nothing at all.
        if gradients:
            torch._foreach_mul_(gradients, factor)

    def gradient_norm(self) -> Tensor:
        """L2 norm of the gradient of the whole model, a float64 scalar, the same on all ranks.

        Each logical parameter counts once: a replicated one on the first tensor rank, a tied one on
        the first stage.
        """
        square = square_sum(self._counted(), self._device)
        for group in (self._groups.model, self._groups.data):
            if group.size() > 1 and (group is self._groups.model or self._cut_over_data):
                dist.all_reduce(square, group=group)
        return square.sqrt()

    @property
    @abstractmethod
    def _device(self) -> torch.device: ...

    @property
    @abstractmethod
    def _cut_over_data(self) -> bool:
        """Whether each data rank holds a part of the reduced gradients."""
