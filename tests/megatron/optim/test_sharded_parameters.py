"""Parameters cut over the data ranks by FSDP: every rank has rows, or nothing."""

from math import prod

import pytest
import torch
from torch.distributed.tensor import DTensor

from megatron.optim.parameters import Parameters
from megatron.optim.sharded_parameters import ShardedParameters
from mpu import ParallelDims, ParallelGroups, build_groups, mark_whole
from tests.distributed import run_ranks
from tests.megatron.optim.keeping import (
    CPU,
    Kept,
    Stage,
    check_kept,
    keep,
    num_elements,
    specs,
)
from tests.shards import region

GRIDS = [
    ParallelDims(),
    ParallelDims(data=2),
    ParallelDims(data=3),
    # More than some parameters have rows.
    ParallelDims(data=5),
    ParallelDims(data=2, pipeline=2),
    ParallelDims(tensor=2, data=3),
    ParallelDims(tensor=2, data=2, pipeline=2),
]


def stage_2(stage: Stage, groups: ParallelGroups) -> Parameters:
    return _build(stage, groups, reshard=False)


def stage_3(stage: Stage, groups: ParallelGroups) -> Parameters:
    return _build(stage, groups, reshard=True)


def _build(stage: Stage, groups: ParallelGroups, *, reshard: bool) -> Parameters:
    dtype = next(stage.parameters()).dtype
    return ShardedParameters([stage], [], groups, CPU, compute_dtype=dtype, reshard=reshard)


@pytest.mark.parametrize("make", [stage_2, stage_3])
@pytest.mark.parametrize("dims", GRIDS, ids=str)
def test_parameters_are_kept(dims: ParallelDims, make: object) -> None:
    ranks: list[Kept] = run_ranks(dims.world_size, keep, dims, make, torch.float64)
    check_kept(ranks, dims)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_computes_with_rounded_main_parameters(dtype: torch.dtype) -> None:
    """Whole numbers this small are not rounded, so that all is exact but for the norm."""
    dims = ParallelDims(tensor=2, data=2)
    ranks: list[Kept] = run_ranks(dims.world_size, keep, dims, stage_2, dtype)
    check_kept(ranks, dims, norm_error=1e-7)


def test_every_rank_holds_whole_rows() -> None:
    ranks: list[Kept] = run_ranks(3, keep, ParallelDims(data=3), stage_3, torch.float64)
    for rank in ranks:
        for held in rank.held["value"]:
            for box in held.boxes:
                assert box.start[1:] == (0,) * (len(box.start) - 1)
                assert tuple(box.tensor.shape[1:]) == held.shape[1:]
    sizes = [num_elements(rank.held["value"]) for rank in ranks]
    assert sum(sizes) == sum(prod(spec.shape) for spec in specs(1).values())


def test_what_a_rank_holds_nothing_of_is_not_updated() -> None:
    """Optimizers need not know of empty tensors."""
    rows = [torch.empty(spec.local_shape(1)[0]).chunk(5) for spec in specs(1).values()]
    held = [sum(rank < len(chunks) for chunks in rows) for rank in range(5)]
    assert held[0] == len(rows) > held[-1]
    assert run_ranks(5, count_mains) == [(0, count) for count in held]


def count_mains() -> tuple[int, int]:
    """Main parameters that are empty, and all of them."""
    groups = build_groups(ParallelDims(data=5))
    parameters = stage_3(Stage(groups, torch.float64), groups)
    mains = [main for group in parameters.main() for main in group]
    return sum(main.numel() == 0 for main in mains), len(mains)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_main_parameters_and_gradients_are_of_high_precision(dtype: torch.dtype) -> None:
    run_ranks(2, check_precision, dtype)


def check_precision(dtype: torch.dtype) -> None:
    groups = build_groups(ParallelDims(data=2))
    stage = Stage(groups, dtype)
    parameters = stage_2(stage, groups)
    ones = {name: torch.ones(spec.local_shape(1), dtype=dtype) for name, spec in specs(1).items()}
    loss = stage(ones)
    assert loss.dtype == dtype
    loss.backward()
    parameters.reduce_gradients()
    for group in parameters.main():
        for main in group:
            assert main.dtype == torch.float32
            assert main.grad is not None
            assert main.grad.dtype == torch.float32
            assert torch.equal(main.grad, torch.full_like(main, 2)), "the sum over two ranks"


def test_gradients_that_nothing_depends_on_are_zero() -> None:
    run_ranks(2, check_missing_gradients)


def check_missing_gradients() -> None:
    groups = build_groups(ParallelDims(data=2))
    stage = Stage(groups, torch.float64)
    parameters = stage_2(stage, groups)
    parameters.reduce_gradients()
    assert parameters.gradient_norm() == 0
    assert all(isinstance(parameter, DTensor) for parameter in stage.parameters())
    assert all(main.grad is not None for group in parameters.main() for main in group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [3, pytest.param(6, marks=pytest.mark.nightly), 7])
def test_the_sum_over_data_ranks_is_not_rounded_by_their_number(
    size: int, dtype: torch.dtype
) -> None:
    """Where one rank alone has a gradient, it is the sum, to the last bit."""
    run_ranks(size, check_sum, dtype)


def check_sum(dtype: torch.dtype) -> None:
    groups = build_groups(ParallelDims(data=torch.distributed.get_world_size()))
    stage = Stage(groups, dtype)
    parameters = stage_2(stage, groups)
    generator = torch.Generator().manual_seed(0)
    wanted = {
        name: torch.randn(spec.local_shape(1), generator=generator, dtype=dtype)
        for name, spec in specs(1).items()
    }
    mine = 1.0 if groups.data.rank() == 1 else 0.0
    stage({name: gradient * mine for name, gradient in wanted.items()}).backward()
    parameters.reduce_gradients()
    for held in parameters.state("weight", gradient_of):
        for box in held.boxes:
            assert torch.equal(box.tensor, wanted[held.name][region(box)]), held.name


def gradient_of(main: torch.nn.Parameter) -> torch.Tensor:
    assert main.grad is not None
    return main.grad


def test_a_rank_that_holds_nothing_at_all_takes_part_in_a_step() -> None:
    norms = run_ranks(2, step_with_one_row)
    assert norms == [3.0, 3.0]


def step_with_one_row() -> float:
    groups = build_groups(ParallelDims(data=2))
    layer = torch.nn.Linear(4, 1, bias=False)
    mark_whole(layer)
    parameters = ShardedParameters(
        [layer], [], groups, CPU, compute_dtype=torch.float32, reshard=True
    )
    parameters.initialise(lambda name, parameter: parameter.data.fill_(1))
    assert len(parameters.main()[0]) == (1 if groups.data.rank() == 0 else 0)
    layer(torch.full((1, 4), 0.75)).sum().backward()
    parameters.reduce_gradients()
    norm = parameters.gradient_norm()
    parameters.scale_gradients(1 / norm)
    return norm.item()
