"""The rank grid: who shares a group with whom."""

import pytest
import torch.distributed as dist

from mpu import ParallelDims, build_groups
from tests.distributed import run_ranks


def test_neighbouring_ranks_share_a_tensor_group() -> None:
    ranks = run_ranks(4, ranks_of_groups, ParallelDims(tensor=2, data=2))
    assert [r["tensor"] for r in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["data"] for r in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [r["pipeline"] for r in ranks] == [[0], [1], [2], [3]]
    assert [r["model"] for r in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_pipeline_is_the_slowest_axis() -> None:
    ranks = run_ranks(8, ranks_of_groups, ParallelDims(tensor=2, data=2, pipeline=2))
    assert [r["tensor"] for r in ranks[:2]] == [[0, 1], [0, 1]]
    assert [r["data"] for r in ranks[:4]] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [r["pipeline"] for r in ranks[:4]] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [r["model"] for r in ranks[:4]] == [[0, 1, 4, 5]] * 2 + [[2, 3, 6, 7]] * 2
    assert [r["embedding"] for r in ranks] == [r["pipeline"] for r in ranks]


def test_first_and_last_stage_share_an_embedding_group() -> None:
    ranks = run_ranks(3, ranks_of_groups, ParallelDims(pipeline=3))
    assert [r["pipeline"] for r in ranks] == [[0, 1, 2]] * 3
    assert [r["embedding"] for r in ranks] == [[0, 2], [1], [0, 2]]


def ranks_of_groups(dims: ParallelDims) -> dict[str, list[int]]:
    groups = build_groups(dims)
    assert groups.dims == dims
    names = ("tensor", "data", "pipeline", "model", "embedding")
    return {name: dist.get_process_group_ranks(getattr(groups, name)) for name in names}


def test_grid_that_does_not_fill_the_world_is_refused() -> None:
    run_ranks(2, check_grid_is_refused)


def check_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor=4.* needs 4 ranks, but the world has 2"):
        build_groups(ParallelDims(tensor=4))


@pytest.mark.parametrize("axis", ["tensor", "data", "pipeline"])
def test_axis_without_ranks_is_refused(axis: str) -> None:
    with pytest.raises(ValueError, match=f"{axis} parallel size must be at least 1, got 0"):
        ParallelDims(**{axis: 0})


def test_world_size_is_the_product_of_the_axes() -> None:
    assert ParallelDims(tensor=4, data=8, pipeline=12).world_size == 384
