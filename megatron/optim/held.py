"""What a rank holds of a logical parameter, as boxes of the whole tensor.

Optimizers keep parameters as stretches of flat storage, cut where it suits them, over tensors that
are themselves cut over the tensor ranks. Here such a stretch becomes boxes again:

    a matrix of 3 columns     [ 0 1 2 ]        a stretch from element 2 to 8
                              [ 3 4 5 ]        is the boxes [2], [3 4 5; 6 7 8]
                              [ 6 7 8 ]
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from mpu import Axis, HeldBox, ParallelGroups, Piece, ShardSpec


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


def counts(spec: ShardSpec, groups: ParallelGroups) -> bool:
    """Whether this rank's part of a parameter counts for the norm, and is saved.

    Each logical element does on one rank: of a replicated parameter the first tensor rank's, of a
    tied one the first stage's. What the data ranks hold is another question.
    """
    return not spec.tied_copy and (spec.dim is not None or groups.tensor.rank() == 0)


def held_by(
    groups: ParallelGroups,
    name: str,
    spec: ShardSpec,
    boxes: Iterable[HeldBox],
    *,
    cut_over_data: bool,
) -> Held:
    """What this rank holds of a parameter, of which the data ranks hold ``boxes`` each, or all."""
    copied_over: list[Axis] = []
    if spec.dim is None:
        copied_over.append("tensor")
    if not cut_over_data:
        copied_over.append("data")
    if spec.tied:
        copied_over.append("embedding")
    alone = cut_over_data or groups.data.rank() == 0
    return Held(name, spec, tuple(boxes), alone and counts(spec, groups), tuple(copied_over))


def flat_boxes(
    spec: ShardSpec, groups: ParallelGroups, start: int, flat: Tensor
) -> Iterator[HeldBox]:
    """The boxes in ``flat``: a stretch of this rank's flattened tensor, from element ``start``."""
    group = groups.tensor
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
