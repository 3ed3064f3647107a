"""The rank grid: who shares a group with whom."""

from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from mpu import ParallelDims, build_groups
from tests.distributed import run_ranks
from tests.figures import Figure


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


BLOOM_176B = ParallelDims(tensor=4, data=8, pipeline=12)


def test_ranks_of_bloom_build_five_groups_at_most(
    monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    built = [built_groups(BLOOM_176B, rank, monkeypatch) for rank in range(BLOOM_176B.world_size)]
    counts = [len(groups) for groups in built]
    members = Counter(group for groups in built for group in groups)
    assert all(count == len(group) for group, count in members.items()), "a member built no group"
    lone = sum(len(group) == 1 for group in members)
    # The middle stages' own, which no other rank has to do with.
    assert lone == (BLOOM_176B.pipeline - 2) * BLOOM_176B.tensor * BLOOM_176B.data
    assert set(counts) == {5}
    figure(
        "groups at 384 ranks",
        most_of_a_rank=max(counts),
        of_several_ranks=len(members) - lone,
        waited_for_by_all_ranks=sum(len(group) == BLOOM_176B.world_size for group in members),
    )


@pytest.mark.parametrize(
    ("dims", "groups"),
    [
        (ParallelDims(), 0),
        (ParallelDims(tensor=4), 1),
        (ParallelDims(data=4), 1),
        (ParallelDims(pipeline=2), 1),
        (ParallelDims(pipeline=4), 2),
        (ParallelDims(tensor=2, data=2), 3),
        (ParallelDims(tensor=2, pipeline=2), 3),
        (ParallelDims(tensor=2, data=2, pipeline=2), 4),
    ],
    ids=str,
)
def test_no_ranks_make_two_groups(
    dims: ParallelDims, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither do all ranks of the world, which are a group already."""
    ranks = [built_groups(dims, rank, monkeypatch) for rank in range(dims.world_size)]
    for built in ranks:
        assert len(set(built)) == len(built)
        assert tuple(range(dims.world_size)) not in built
    assert max(map(len, ranks)) == groups


def built_groups(
    dims: ParallelDims, rank: int, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, ...]]:
    """The ranks of every group that ``rank`` asks torch for."""
    built: list[tuple[int, ...]] = []
    new_group = dist.new_group

    def note(ranks: list[int], **options: Any) -> ProcessGroup:
        built.append(tuple(ranks))
        return new_group(ranks, **options)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=dims.world_size)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(dist, "new_group", note)
            groups = build_groups(dims)
        assert dist.get_process_group_ranks(groups.model).count(rank) == 1
    finally:
        dist.destroy_process_group()
    return built


@pytest.mark.parametrize(
    "dims", [ParallelDims(tensor=2, data=2), ParallelDims(pipeline=4)], ids=str
)
def test_every_group_waits_as_long_as_it_is_told(dims: ParallelDims) -> None:
    assert run_ranks(4, timeouts, dims) == [{timedelta(seconds=7)}] * 4


def timeouts(dims: ParallelDims) -> set[timedelta]:
    groups = build_groups(dims, timedelta(seconds=7))
    names = ("tensor", "data", "pipeline", "model", "embedding")
    built = {getattr(groups, name) for name in names} - {dist.group.WORLD}
    cpu = torch.device("cpu")
    return {group._get_backend(cpu).options._timeout for group in built}
