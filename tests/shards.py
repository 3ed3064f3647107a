"""Between a whole tensor and the parts of it that a ShardSpec gives to the tensor ranks."""

import math
from collections.abc import Sequence

from torch import Tensor

from mpu import Box, ShardSpec


def region(box: Box) -> tuple[slice, ...]:
    """What to index the whole tensor with."""
    return tuple(slice(a, a + n) for a, n in zip(box.start, box.tensor.shape, strict=True))


def cut(whole: Tensor, spec: ShardSpec, rank: int, size: int) -> Tensor:
    """What tensor rank ``rank`` of ``size`` holds of ``whole``; padding is zero."""
    local = whole.new_zeros(spec.local_shape(size))
    for box in spec.boxes(local, rank, size):
        box.tensor.copy_(whole[region(box)])
    return local


def join(parts: Sequence[Tensor], spec: ShardSpec) -> Tensor:
    """The whole of the ranks' ``parts``; what none of them holds is NaN."""
    whole = parts[0].new_full(spec.shape, math.nan)
    for rank, part in enumerate(parts):
        for box in spec.boxes(part, rank, len(parts)):
            whole[region(box)] = box.tensor
    return whole
