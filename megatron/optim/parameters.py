"""What an optimizer updates: the contract between engine, optimizer and how weights are kept.

    parallel.zero   kept by              whole on every data rank        cut over the data ranks
    0               FlatParameters       weights, gradients, state
    1               FlatParameters       weights, gradients              state
    2               ShardedParameters    weights, during a step          gradients, state
    3               ShardedParameters    a layer's weights, in use       weights, gradients, state

The optimizer updates *main* parameters in fp32 (fp64 in a run of that precision). They are
stretches of storage, cut where it suits the keeper; ``held`` tells which boxes of which logical
parameter lie in them. The model computes with weights of its own precision, which follow by
``publish``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpu import Axis, HeldBox, ParallelGroups, Piece, ShardSpec

Fill: TypeAlias = Callable[[str, nn.Parameter], None]
"""Gives this rank's part of the parameter of that name its value."""

_NORM_ELEMENTS = 2**24
"""Elements whose squares are summed up in the precision of the gradient; more are in float64."""


@dataclass(frozen=True)
class Held:
    """What this rank holds of one logical parameter.

    Attributes:
        boxes: parts of it, in no order; there may be none.
        owned: this rank saves the boxes; of the ranks that hold equal ones, exactly one does.
        copied_over: axes of the rank grid along which all ranks hold equal boxes.
    """

    name: str
    spec: ShardSpec
    boxes: tuple[HeldBox, ...]
    owned: bool
    copied_over: tuple[Axis, ...]


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
    def held(self, of: Callable[[nn.Parameter], Tensor]) -> Iterator[Held]:
        """The boxes of every parameter in what ``of`` gives for the main ones, of their shapes."""

    @abstractmethod
    def weights(self) -> list[Tensor]:
        """What the model computes with, as it is kept between steps."""

    @abstractmethod
    def gradient_bytes(self) -> int:
        """Size of what the gradients of a step are added up in."""

    @abstractmethod
    def zero_gradients(self) -> None:
        """Begin a step."""

    @abstractmethod
    def reduce_gradients(self) -> None:
        """Sum the gradients over the data ranks, and over other ranks what they hold parts of."""

    @abstractmethod
    def publish(self) -> None:
        """Let the model compute with the main parameters as they are now."""

    @abstractmethod
    def _counted(self) -> list[Tensor]:
        """The gradients of this rank that count for the norm: each logical element on one rank."""

    def scale_gradients(self, factor: Tensor) -> None:
        decayed, others = self.main()
        torch._foreach_mul_([p.grad for p in (*decayed, *others) if p.grad is not None], factor)

    def gradient_norm(self) -> Tensor:
        """L2 norm of the gradient of the whole model, a float64 scalar, the same on all ranks.

        Each logical parameter counts once: a replicated one on the first tensor rank, a tied one on
        the first stage.
        """
        parts = [part for grad in self._counted() for part in grad.view(-1).split(_NORM_ELEMENTS)]
        square = torch.zeros((), dtype=torch.float64, device=self._device)
        if parts:
            square += torch.stack(torch._foreach_norm(parts)).double().square().sum()
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

    def _counts(self, spec: ShardSpec) -> bool:
        """Whether this rank's part of a parameter counts for the norm, and is saved.

        What the data ranks hold is another question.
        """
        return not spec.tied_copy and (spec.dim is not None or self._groups.tensor.rank() == 0)

    def _held(self, name: str, spec: ShardSpec, boxes: Iterable[HeldBox]) -> Held:
        copied_over: list[Axis] = []
        if spec.dim is None:
            copied_over.append("tensor")
        if not self._cut_over_data:
            copied_over.append("data")
        if spec.tied:
            copied_over.append("embedding")
        alone = self._cut_over_data or self._groups.data.rank() == 0
        return Held(name, spec, tuple(boxes), alone and self._counts(spec), tuple(copied_over))

    def _boxes(self, spec: ShardSpec, start: int, flat: Tensor) -> Iterator[HeldBox]:
        """The boxes in ``flat``: a part of this rank's tensor, from element ``start`` on."""
        group = self._groups.tensor
        shape = spec.local_shape(group.size())
        for box_start, box in _cut_flat(shape, start, flat):
            for piece in spec.pieces(group.rank(), group.size()):
                yield from _intersect(box_start, box, piece)


def _cut_flat(
    shape: Sequence[int], start: int, flat: Tensor
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Cut a part of a flattened tensor of one or two dimensions into boxes with their starts.

    Those are the end of a row, whole rows, and the beginning of a row.
    """
    width = prod(shape[1:])
    stop = start + flat.numel()
    head_stop = min(stop, -(-start // width) * width)
    body_stop = max(head_stop, stop // width * width)
    for first, last in ((start, head_stop), (head_stop, body_stop), (body_stop, stop)):
        if first == last:
            continue
        part = flat[first - start : last - start]
        if len(shape) == 1:
            yield (first,), part
        else:
            row, column = divmod(first, width)
            yield (row, column), part.view(-1, min(width, last - first))


def _intersect(start: tuple[int, ...], box: Tensor, piece: Piece) -> Iterator[HeldBox]:
    """The part of a box of the local tensor that lies in ``piece``, if there is one."""
    ends = [a + n for a, n in zip(start, box.shape, strict=True)]
    firsts = [max(a, b) for a, b in zip(start, piece.local_start, strict=True)]
    lasts = [
        min(end, b + n) for end, b, n in zip(ends, piece.local_start, piece.shape, strict=True)
    ]
    if any(first >= last for first, last in zip(firsts, lasts, strict=True)):
        return
    inside = tuple(
        slice(first - a, last - a) for first, last, a in zip(firsts, lasts, start, strict=True)
    )
    logical = tuple(
        first - b + whole
        for first, b, whole in zip(firsts, piece.local_start, piece.start, strict=True)
    )
    yield HeldBox(logical, box[inside])
