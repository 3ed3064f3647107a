"""Parameters in flat buffers: whole on every data rank, or with the main ones shared out."""

from math import prod
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed import ProcessGroup

from megatron.optim import flat_parameters
from megatron.optim.flat_parameters import FlatParameters
from megatron.optim.parameters import Parameters
from mpu import ParallelDims, ParallelGroups, ShardedTensor, build_groups, mark_whole
from tests.distributed import run_ranks
from tests.megatron.optim.keeping import (
    CPU,
    Kept,
    Stage,
    check_boxes,
    check_kept,
    copies,
    fill_in,
    keep,
    num_elements,
    specs,
    whole_value,
)

GRIDS = [
    ParallelDims(),
    ParallelDims(tensor=2),
    ParallelDims(data=3),
    ParallelDims(data=2, pipeline=2),
    ParallelDims(tensor=2, data=3),
    ParallelDims(tensor=2, data=2, pipeline=2),
]
MANY = ParallelDims(data=5)
"""More data ranks than some parameters have rows or elements."""


def whole(stage: Stage, groups: ParallelGroups) -> Parameters:
    return FlatParameters([stage], groups, CPU)


def shared_out(stage: Stage, groups: ParallelGroups) -> Parameters:
    return FlatParameters([stage], groups, CPU, shard=True)


@pytest.mark.parametrize("dims", GRIDS, ids=str)
def test_whole_parameters_are_kept(dims: ParallelDims) -> None:
    ranks: list[Kept] = run_ranks(dims.world_size, keep, dims, whole, torch.float64)
    check_kept(ranks, dims)


@pytest.mark.parametrize("dims", [*GRIDS, MANY], ids=str)
def test_shared_out_parameters_are_kept(dims: ParallelDims) -> None:
    ranks: list[Kept] = run_ranks(dims.world_size, keep, dims, shared_out, torch.float64)
    check_kept(ranks, dims)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_computes_with_rounded_main_parameters(dtype: torch.dtype) -> None:
    """Whole numbers this small are not rounded, so that all is exact but for the norm."""
    dims = ParallelDims(tensor=2, data=2)
    ranks: list[Kept] = run_ranks(dims.world_size, keep, dims, shared_out, dtype)
    check_kept(ranks, dims, norm_error=1e-7)


def test_each_data_rank_has_an_equal_share_that_may_cut_rows() -> None:
    ranks = run_ranks(3, share)
    assert len({size for size, _ in ranks}) == 1
    logical = sum(prod(spec.shape) for spec in specs(1).values())
    assert sum(num_elements(held) for _, held in ranks) == logical
    boxes = [box for _, entries in ranks for held in entries for box in held.boxes]
    assert [box for box in boxes if len(box.start) == 2 and box.start[1] > 0]


def share() -> tuple[int, list[ShardedTensor]]:
    """Elements of the main parameters of one of three ranks, padding included, and what is held."""
    groups = build_groups(ParallelDims(data=3))
    parameters = shared_out(Stage(groups, torch.float64), groups)
    size = sum(main.numel() for group in parameters.main() for main in group)
    return size, copies(parameters, lambda main: main)


@pytest.mark.parametrize("shard", [False, True])
def test_what_is_too_large_for_one_main_parameter_is_cut(shard: bool) -> None:
    dims = ParallelDims(tensor=2, data=2)
    ranks = run_ranks(dims.world_size, hold_small_parts, dims, shard)
    assert [rank[0] for rank in ranks] == [7] * dims.world_size
    check_boxes(
        [rank[1] for rank in ranks], lambda name, spec: whole_value(name, spec.shape), specs(2)
    )


def hold_small_parts(dims: ParallelDims, shard: bool) -> tuple[int, list[ShardedTensor]]:
    """The size of the largest main parameter, and what is held."""
    groups = build_groups(dims)
    with patch.object(flat_parameters, "_LARGEST", 7):
        parameters = FlatParameters([Stage(groups, torch.float64)], groups, CPU, shard=shard)
    fill_in(parameters, groups)
    mains = [main for group in parameters.main() for main in group]
    return max(main.numel() for main in mains), copies(parameters, lambda main: main)


@pytest.fixture
def alone(single_group: ProcessGroup) -> ParallelGroups:
    return ParallelGroups(ParallelDims(), *[single_group] * 5)


def test_bf16_gradients_add_up_in_fp32(alone: ParallelGroups) -> None:
    layer = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    mark_whole(layer)
    parameters = FlatParameters([layer], alone, CPU)
    gradients = torch.randn(300, 8, 8).bfloat16()
    in_fp32, in_bf16 = torch.zeros(8, 8), torch.zeros(8, 8, dtype=torch.bfloat16)
    for gradient in gradients:
        (layer.weight * gradient).sum().backward()
        in_fp32 += gradient
        in_bf16 += gradient
        assert layer.weight.grad is None
    ((held,),) = [entry.boxes for entry in copies(parameters, lambda main: main.grad)]  # type: ignore[arg-type, return-value]
    assert torch.equal(held.tensor.float(), in_fp32)
    assert not torch.equal(held.tensor.float(), in_bf16.float())


def test_a_new_step_forgets_the_gradients_of_the_last(alone: ParallelGroups) -> None:
    layer = nn.Linear(8, 8, dtype=torch.float64)
    mark_whole(layer)
    parameters = FlatParameters([layer], alone, CPU)
    layer(torch.ones(2, 8, dtype=torch.float64)).sum().backward()
    assert parameters.gradient_norm() > 0
    parameters.zero_gradients()
    assert parameters.gradient_norm() == 0


def test_padding_between_parameters_stays_zero(alone: ParallelGroups) -> None:
    """Or it would count for the norm, and grow."""
    stage = Stage(alone, torch.float64)
    parameters = FlatParameters([stage], alone, CPU)
    fill_in(parameters, alone)
    total = sum(main.numel() for group in parameters.main() for main in group)
    used = sum(int((main != 0).sum()) for group in parameters.main() for main in group)
    logical = sum(prod(spec.shape) for spec in specs(1).values())
    assert total % 64 == 0
    assert used == logical < total
