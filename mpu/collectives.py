"""The collectives under ``mpu.mappings`` and the parallel layers, without gradients.

But for the one in place, they never change their argument, which autograd or the caller may still
read, and they do nothing in a group of one rank. The ``start`` forms return at once; their
``Pending`` gives the result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed the two; 2.9 to 2.12 have the older names only.
_all_gather_single: Callable[..., Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)
_reduce_scatter_single: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


@dataclass(frozen=True)
class Pending:
    """A collective on its way."""

    work: dist.Work
    out: Tensor
    finish: Callable[[Tensor], Tensor]

    def wait(self) -> Tensor:
        """Return the result, once it is there."""
        self.work.wait()
        return self.finish(self.out)


@dataclass(frozen=True)
class Done:
    """The ``Pending`` of a group of one rank."""

    out: Tensor

    def wait(self) -> Tensor:
        return self.out


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum of ``x`` over the ranks of ``group``."""
    return start_all_reduce(x, group).wait()


def all_gather(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """The ranks' ``x``, concatenated along ``dim``."""
    size = group.size()
    if size == 1:
        return x
    front = x.movedim(dim, 0).contiguous()
    out = front.new_empty((size * front.size(0), *front.shape[1:]))
    _all_gather_single(out, front, group=group)
    return out.movedim(0, dim).contiguous()


def all_gather_in_place(out: Tensor, group: ProcessGroup) -> None:
    """Fill ``out``, ``(size * n,)``, of which each rank has set its own part."""
    _all_gather_single(out, out.chunk(group.size())[group.rank()], group=group)


def reduce_scatter(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's part, along ``dim``, of the sum of ``x`` over the ranks."""
    return start_reduce_scatter(x, group, dim).wait()


def split(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's part of ``x`` along ``dim``.

    Raises:
        ValueError: if the dimension does not divide by the size of the group.
    """
    check_divides(x, group, dim)
    return x.chunk(group.size(), dim=dim)[group.rank()].contiguous()


def start_all_reduce(x: Tensor, group: ProcessGroup) -> Pending | Done:
    """Begin ``all_reduce``."""
    if group.size() == 1:
        return Done(x)
    out = x.clone(memory_format=torch.contiguous_format)
    return Pending(_work(dist.all_reduce(out, group=group, async_op=True)), out, _unchanged)


def start_reduce_scatter(x: Tensor, group: ProcessGroup, dim: int) -> Pending | Done:
    """Begin ``reduce_scatter``."""
    size = group.size()
    if size == 1:
        return Done(x)
    check_divides(x, group, dim)
    front = x.movedim(dim, 0).contiguous()
    out = front.new_empty((front.size(0) // size, *front.shape[1:]))
    work = _work(_reduce_scatter_single(out, front, group=group, async_op=True))
    return Pending(work, out, lambda out: out.movedim(0, dim).contiguous())


def check_divides(x: Tensor, group: ProcessGroup, dim: int) -> None:
    """Raise a ValueError if a dimension of ``x`` does not divide by the size of ``group``."""
    if x.size(dim) % group.size() != 0:
        raise ValueError(
            f"cannot split dimension {dim} of {tuple(x.shape)} over {group.size()} ranks"
        )


def _unchanged(x: Tensor) -> Tensor:
    return x


def _work(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is not in the group"
    return work
