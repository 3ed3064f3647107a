"""Layers that communicate beside their products, by the operators of GPUs."""

import pytest
import torch

from mpu import ParallelDims, build_groups
from tests.distributed import run_ranks
from tests.mpu.test_layers import BATCH, IN, SEQ
from tests.mpu.test_overlap import Block, run_block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("in_place", [False, True])
def test_block_matches_the_ordinary_one(in_place: bool) -> None:
    assert max(run_ranks(2, largest_difference, in_place)) < 1e-12


def largest_difference(in_place: bool) -> float:
    group = build_groups(ParallelDims(tensor=2)).tensor
    torch.cuda.set_device(group.rank())
    x = torch.randn(BATCH, SEQ // 2, IN, dtype=torch.float64).cuda()
    ordinary, overlapping = (
        run_block(Block(group, symmetric_memory=overlaps).cuda(), x, in_place)
        for overlaps in (False, True)
    )
    return max((ordinary[name] - overlapping[name]).abs().max().item() for name in ordinary)
