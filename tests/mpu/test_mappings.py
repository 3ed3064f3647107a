"""Each mapping by what it is, a linear map over all ranks, and its gradient by the transpose of it.

If y = M x for the stacked inputs x and outputs y of all ranks, then <v, M x> = <M^T v, x>: summed
over the ranks, outputs times their gradients equal inputs times theirs. Together with the forward
values, which are compared with what every rank can compute alone, this fixes every gradient.
Integers in float64 make all of it exact.
"""

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mpu import (
    ParallelDims,
    build_groups,
    copy_to_region,
    gather_from_region,
    gather_from_sequence,
    reduce_from_region,
    reduce_scatter_to_sequence,
    scatter_to_region,
    scatter_to_sequence,
)
from tests.distributed import run_ranks

Mapping: TypeAlias = Callable[[Tensor, ProcessGroup], Tensor]


def integers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).double()


# What each mapping makes of the inputs of all ranks, on rank r of t.
FORWARD: dict[Mapping, Callable[[list[Tensor], int, int], Tensor]] = {
    copy_to_region: lambda xs, r, t: xs[r],
    reduce_from_region: lambda xs, r, t: torch.stack(xs).sum(0),
    scatter_to_region: lambda xs, r, t: xs[r].chunk(t, -1)[r],
    gather_from_region: lambda xs, r, t: torch.cat(xs, -1),
    scatter_to_sequence: lambda xs, r, t: xs[r].chunk(t, -2)[r],
    gather_from_sequence: lambda xs, r, t: torch.cat(xs, -2),
    reduce_scatter_to_sequence: lambda xs, r, t: torch.stack(xs).sum(0).chunk(t, -2)[r],
}


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("mapping", FORWARD, ids=lambda mapping: mapping.__name__)
def test_forward_is_what_it_says(mapping: Mapping, tensor: int) -> None:
    run_ranks(tensor, check_forward, mapping, tensor)


def check_forward(mapping: Mapping, tensor: int) -> None:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    inputs = [integers(2, 4, 8, seed=rank) for rank in range(tensor)]
    x = inputs[group.rank()].clone()
    y = mapping(x, group)
    assert torch.equal(y, FORWARD[mapping](inputs, group.rank(), tensor))
    assert torch.equal(x, inputs[group.rank()]), "the input was changed"


# What the ranks' gradients of the output become, on rank r of t.
BACKWARD: dict[Mapping, Callable[[list[Tensor], int, int], Tensor]] = {
    copy_to_region: FORWARD[reduce_from_region],
    reduce_from_region: FORWARD[copy_to_region],
    scatter_to_region: FORWARD[gather_from_region],
    gather_from_region: FORWARD[scatter_to_region],
    scatter_to_sequence: FORWARD[gather_from_sequence],
    gather_from_sequence: FORWARD[reduce_scatter_to_sequence],
    reduce_scatter_to_sequence: FORWARD[gather_from_sequence],
}
