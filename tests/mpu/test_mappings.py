"""Each mapping and its gradient against what one process makes of the tensors of all ranks.

The numbers are integers, so that every comparison is exact.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import pytest
import torch
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
Expected: TypeAlias = Callable[[list[Tensor], int], Tensor]


def own(xs: list[Tensor], rank: int) -> Tensor:
    return xs[rank]


def total(xs: list[Tensor], rank: int) -> Tensor:
    return torch.stack(xs).sum(dim=0)


def part(xs: list[Tensor], rank: int, *, dim: int) -> Tensor:
    return xs[rank].chunk(len(xs), dim=dim)[rank]


def all_parts(xs: list[Tensor], rank: int, *, dim: int) -> Tensor:
    return torch.cat(xs, dim=dim)


def part_of_total(xs: list[Tensor], rank: int) -> Tensor:
    return total(xs, rank).chunk(len(xs), dim=-2)[rank]


# Name: the mapping, and what it makes of all ranks' inputs and of all ranks' gradients.
MAPPINGS: dict[str, tuple[Mapping, Expected, Expected]] = {
    "copy": (copy_to_region, own, total),
    "reduce": (reduce_from_region, total, own),
    "scatter": (scatter_to_region, partial(part, dim=-1), partial(all_parts, dim=-1)),
    "gather": (gather_from_region, partial(all_parts, dim=-1), partial(part, dim=-1)),
    "scatter to sequence": (
        scatter_to_sequence,
        partial(part, dim=-2),
        partial(all_parts, dim=-2),
    ),
    "gather from sequence": (gather_from_sequence, partial(all_parts, dim=-2), part_of_total),
    "gather from sequence, repeated": (
        partial(gather_from_sequence, sum_gradients=False),
        partial(all_parts, dim=-2),
        partial(part, dim=-2),
    ),
    "reduce-scatter": (reduce_scatter_to_sequence, part_of_total, partial(all_parts, dim=-2)),
}


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_mappings_and_their_gradients(tensor: int) -> None:
    run_ranks(tensor, check_mappings, tensor)


def check_mappings(tensor: int) -> None:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    rank = group.rank()
    for name, (mapping, forward, backward) in MAPPINGS.items():
        inputs = [integers((2, 4, 8), seed) for seed in range(tensor)]
        x = inputs[rank].clone().requires_grad_()
        y = mapping(x, group)
        assert torch.equal(y, forward(inputs, rank)), name

        grads = [integers(y.shape, 100 + seed) for seed in range(tensor)]
        grad = grads[rank].clone()
        y.backward(grad)
        assert x.grad is not None
        assert torch.equal(x.grad, backward(grads, rank)), f"gradient of {name}"
        assert torch.equal(x, inputs[rank]), f"{name} changed its input"
        assert torch.equal(grad, grads[rank]), f"{name} changed its gradient"


def integers(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).double()


@pytest.mark.parametrize("tensor", [2, 4])
def test_non_contiguous_tensors_are_mapped_alike(tensor: int) -> None:
    run_ranks(tensor, check_non_contiguous, tensor)


def check_non_contiguous(tensor: int) -> None:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    inputs = [integers((8, 4, 2), seed).transpose(0, 2) for seed in range(tensor)]
    for name, (mapping, forward, _) in MAPPINGS.items():
        y = mapping(inputs[group.rank()], group)
        assert torch.equal(y, forward(inputs, group.rank())), name


@pytest.mark.parametrize(
    ("mapping", "dim"),
    [(scatter_to_region, -1), (scatter_to_sequence, -2), (reduce_scatter_to_sequence, -2)],
)
def test_uneven_split_is_refused(mapping: Mapping, dim: int) -> None:
    run_ranks(2, check_uneven_split_is_refused, mapping, dim)


def check_uneven_split_is_refused(mapping: Mapping, dim: int) -> None:
    group = build_groups(ParallelDims(tensor=2)).tensor
    with pytest.raises(ValueError, match=rf"cannot split dimension {dim} of \(3, 3\) over 2 ranks"):
        mapping(torch.ones(3, 3), group)
