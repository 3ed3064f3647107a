"""A batch goes from the first tensor rank to the others, or fails on all of them."""

import pytest
import torch
from torch import Tensor

from mpu import ParallelDims, broadcast_batch, build_groups
from tests.distributed import run_ranks

NAMES = ("tokens", "samples", "rank")
CPU = torch.device("cpu")


def batch_of(data_rank: int) -> dict[str, Tensor]:
    return {
        "tokens": torch.arange(24).view(2, 3, 4) + 2**40 + data_rank,
        "samples": torch.tensor([7, -(2**62)]),
        "rank": torch.tensor(data_rank),
    }


@pytest.mark.parametrize("dims", [ParallelDims(), ParallelDims(tensor=2, data=2)])
def test_every_tensor_rank_gets_the_batch_of_the_first(dims: ParallelDims) -> None:
    run_ranks(dims.world_size, check_broadcast, dims)


def check_broadcast(dims: ParallelDims) -> None:
    groups = build_groups(dims)
    want = batch_of(groups.data.rank())
    given = want if groups.tensor.rank() == 0 else None
    got = broadcast_batch(given, NAMES, group=groups.tensor, device=CPU)
    assert list(got) == list(NAMES)
    for name, tensor in want.items():
        assert got[name].dtype == torch.int64
        assert torch.equal(got[name], tensor), name


def test_batches_of_changing_and_empty_shapes_go_through() -> None:
    run_ranks(2, check_changing_shapes)


def check_changing_shapes() -> None:
    group = build_groups(ParallelDims(tensor=2)).tensor
    for shape in [(3, 5), (1, 2, 3, 4), (0, 5), ()]:
        batch = {"x": torch.full(shape, 3)} if group.rank() == 0 else None
        got = broadcast_batch(batch, ("x",), group=group, device=CPU)
        assert torch.equal(got["x"], torch.full(shape, 3))


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_missing_batch_fails_on_every_rank(tensor: int) -> None:
    run_ranks(tensor, check_missing_batch, tensor)


def check_missing_batch(tensor: int) -> None:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    with pytest.raises(ValueError, match="the rank that reads the data has no batch"):
        broadcast_batch(None, NAMES, group=group, device=CPU)
    # The group is still in step: the next batch arrives.
    batch = batch_of(0) if group.rank() == 0 else None
    got = broadcast_batch(batch, NAMES, group=group, device=CPU)
    assert torch.equal(got["tokens"], batch_of(0)["tokens"])
