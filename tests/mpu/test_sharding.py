"""Pieces of a ShardSpec: every element of the whole is held once, where it should be."""

import random

import pytest
import torch
from torch import nn

from mpu import Piece, ShardSpec, set_shard_spec, shard_spec
from tests.shards import box, cut, join


def random_spec(numbers: random.Random) -> ShardSpec:
    """A spec of one to three dimensions, in one to three blocks, that need not divide."""
    num_dims = numbers.randint(1, 3)
    dim = numbers.randrange(num_dims)
    blocks = numbers.randint(1, 3)
    shape = [numbers.randint(1, 5) for _ in range(num_dims)]
    shape[dim] = blocks * numbers.randint(1, 12)
    return ShardSpec(shape=tuple(shape), dim=dim, blocks=blocks)


@pytest.mark.parametrize("seed", range(50))
def test_pieces_tile_the_whole_exactly(seed: int) -> None:
    numbers = random.Random(seed)
    spec, size = random_spec(numbers), numbers.randint(1, 6)
    held = torch.zeros(spec.shape, dtype=torch.int64)
    for rank in range(size):
        local = torch.zeros(spec.local_shape(size), dtype=torch.int64)
        for piece in spec.pieces(rank, size):
            held[box(piece)] += 1
            local[piece.local_slices] += 1
            assert local[piece.local_slices].shape == held[box(piece)].shape == piece.shape
        assert local.max() <= 1, "two pieces lie in the same place"
    assert (held == 1).all()


@pytest.mark.parametrize("seed", range(50))
def test_whole_is_the_same_after_cut_and_join(seed: int) -> None:
    numbers = random.Random(seed)
    spec, size = random_spec(numbers), numbers.randint(1, 6)
    whole = torch.randn(spec.shape)
    assert torch.equal(join([cut(whole, spec, rank, size) for rank in range(size)], spec), whole)


def test_blocks_are_cut_one_by_one() -> None:
    whole = torch.arange(8)
    plain, stacked = ShardSpec(shape=(8,), dim=0), ShardSpec(shape=(8,), dim=0, blocks=2)
    assert [cut(whole, plain, rank, 2).tolist() for rank in range(2)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    assert [cut(whole, stacked, rank, 2).tolist() for rank in range(2)] == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
    ]


def test_last_ranks_hold_padding() -> None:
    spec = ShardSpec(shape=(509, 4), dim=0, padded_run=256)
    assert spec.local_shape(4) == (256, 4)
    assert spec.pieces(1, 4) == [Piece(start=(256, 0), shape=(253, 4), local_start=(0, 0))]
    assert spec.pieces(2, 4) == spec.pieces(3, 4) == []


def test_replicated_parameter_is_one_piece_everywhere() -> None:
    spec = ShardSpec(shape=(3, 4))
    for rank in range(4):
        assert spec.pieces(rank, 4) == [Piece(start=(0, 0), shape=(3, 4), local_start=(0, 0))]
    assert spec.local_shape(4) == (3, 4)


def test_parameter_without_a_spec_is_whole() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    assert shard_spec(parameter) == ShardSpec(shape=(2, 3))
    set_shard_spec(parameter, ShardSpec(shape=(2, 6), dim=1))
    assert shard_spec(parameter) == ShardSpec(shape=(2, 6), dim=1)
