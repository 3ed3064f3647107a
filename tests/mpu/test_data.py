"""A batch goes from the first tensor rank to the others, or fails on all of them."""

import random
from typing import Any

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


NUMBERS = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


@pytest.mark.parametrize("tensor", [1, 2])
def test_any_dtype_and_stride_arrives_bit_for_bit(tensor: int) -> None:
    run_ranks(tensor, check_dtypes, tensor)


def check_dtypes(tensor: int) -> None:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    numbers = random.Random(0)
    for _ in range(30):
        want = {str(key): random_tensor(numbers) for key in range(numbers.randint(1, 4))}
        batch = want if group.rank() == 0 else None
        got = broadcast_batch(batch, tuple(want), group=group, device=CPU)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=0)


def random_tensor(numbers: random.Random) -> Tensor:
    shape = [numbers.randint(0, 3) for _ in range(numbers.randint(0, 4))]
    generator = torch.Generator().manual_seed(numbers.randrange(2**32))
    value = torch.randint(-3, 100, shape, generator=generator).to(numbers.choice(NUMBERS))
    if value.dim() > 1 and numbers.random() < 0.5:
        value = value.transpose(0, 1)
    return value.conj() if value.is_complex() and numbers.random() < 0.5 else value


FAULTS: list[tuple[Any, str]] = [
    ({"y": torch.zeros(3)}, "batch tensor x is missing"),
    ({"x": torch.zeros(1, 1, 1, 1, 1)}, "batch tensor x has more than 4 dimensions"),
    ({"x": torch.zeros(2, device="meta")}, "batch tensor x must be a plain tensor on the CPU"),
    ({"x": torch.zeros(2, 2).to_sparse()}, "batch tensor x must be a plain tensor on the CPU"),
    ({"x": [1, 2]}, "batch tensor x must be a plain tensor on the CPU"),
    (
        {"x": torch.zeros(2, dtype=torch.float8_e4m3fn)},
        "batch tensor x must have one of the dtypes",
    ),
    ([1, 2], "the rank that reads the data has no batch"),
]


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_bad_batch_fails_on_every_rank(tensor: int) -> None:
    run_ranks(tensor, check_bad_batches, tensor)


def check_bad_batches(tensor: int) -> None:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    for batch, message in FAULTS:
        with pytest.raises(ValueError, match=message):
            broadcast_batch(batch if group.rank() == 0 else None, ("x",), group=group, device=CPU)
    # The group is still in step.
    batch = {"x": torch.ones(3)} if group.rank() == 0 else None
    assert broadcast_batch(batch, ("x",), group=group, device=CPU)["x"].sum() == 3
