"""Collectives over one process group, with the gradients that go with them.

Each pair below is conjugate: the backward of one is the forward of the other.

    copy             (identity, all-reduce)       <->  reduce          (all-reduce, identity)
    scatter          (split, all-gather)          <->  gather          (all-gather, split)
    gather sequence  (all-gather, reduce-scatter) <->  reduce-scatter  (reduce-scatter, all-gather)

``scatter`` and ``gather`` cut the last dimension. The sequence functions cut the dimension before
it, of ``(batch, seq, hidden)``: between the parallel layers of a model with sequence parallelism,
each rank of the tensor group keeps a part of the sequence. They replace ``copy`` and ``reduce``
there, and move the same volume.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mpu.collectives import all_gather, all_reduce, reduce_scatter, split

SEQUENCE_DIM = -2


def copy_to_region(x: Tensor, group: ProcessGroup) -> Tensor:
    """Enter a parallel region with a replicated tensor; gradients are summed."""
    return _Copy.apply(x, group)


def reduce_from_region(x: Tensor, group: ProcessGroup) -> Tensor:
    """Leave a parallel region by summing the partial results of its ranks."""
    return _Reduce.apply(x, group)


def scatter_to_region(x: Tensor, group: ProcessGroup) -> Tensor:
    """Keep this rank's slice: ``(*, n)`` -> ``(*, n / group size)``."""
    return _Scatter.apply(x, group, -1)


def gather_from_region(x: Tensor, group: ProcessGroup) -> Tensor:
    """Concatenate the slices of the ranks: ``(*, n)`` -> ``(*, n * group size)``."""
    return _Gather.apply(x, group, -1)


def scatter_to_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """Keep this rank's part of a replicated sequence: ``(*, seq, n)`` -> ``(*, seq / size, n)``."""
    return _Scatter.apply(x, group, SEQUENCE_DIM)


def gather_from_sequence(x: Tensor, group: ProcessGroup, *, sum_gradients: bool = True) -> Tensor:
    """Concatenate the parts of a sequence: ``(*, seq / size, n)`` -> ``(*, seq, n)``.

    Into a parallel region, each rank's gradient is a part of a sum, which is reduced and scattered.
    Into a computation that all ranks repeat, with ``sum_gradients=False``, it is split.
    """
    if sum_gradients:
        return _GatherSequence.apply(x, group)
    return _Gather.apply(x, group, SEQUENCE_DIM)


def reduce_scatter_to_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """Leave a parallel region by a sum, of which each rank keeps its part.

    ``(*, seq, n)`` -> ``(*, seq / size, n)``
    """
    return _ReduceScatterSequence.apply(x, group)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(x.view_as(x), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return split(x.view_as(x), group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, ctx.group, ctx.dim), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return all_gather(x.view_as(x), group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return split(grad, ctx.group, ctx.dim), None, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x.view_as(x), group, SEQUENCE_DIM)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.group, SEQUENCE_DIM), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x.view_as(x), group, SEQUENCE_DIM)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.group, SEQUENCE_DIM), None
