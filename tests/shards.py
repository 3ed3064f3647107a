"""Between a whole tensor and the parts of it that a ShardSpec gives to the tensor ranks."""

import math
from collections.abc import Sequence

from torch import Tensor

from mpu import HeldBox, Piece, ShardSpec


def box(piece: Piece) -> tuple[slice, ...]:
    """What to index the whole tensor with."""
    return tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))


def region(held: HeldBox) -> tuple[slice, ...]:
    """What to index the whole tensor with."""
    return tuple(slice(a, a + n) for a, n in zip(held.start, held.tensor.shape, strict=True))


def cut(whole: Tensor, spec: ShardSpec, rank: int, size: int) -> Tensor:
    """What tensor rank ``rank`` of ``size`` holds of ``whole``; padding is zero."""
    local = whole.new_zeros(spec.local_shape(size))
    for piece in spec.pieces(rank, size):
        local[piece.local_slices] = whole[box(piece)]
    return local


def join(parts: Sequence[Tensor], spec: ShardSpec) -> Tensor:
    """The whole of the ranks' ``parts``; what none of them holds is NaN."""
    whole = parts[0].new_full(spec.shape, math.nan)
    for rank, part in enumerate(parts):
        for piece in spec.pieces(rank, len(parts)):
            whole[box(piece)] = part[piece.local_slices]
    return whole
