"""What one rank was asked is heard by all."""

import os

import pytest

from megatron.training.stopping import agreed
from tests.distributed import run_ranks


def answers(rank: int) -> list[bool]:
    """What the ranks agree on before and after ``rank`` is asked to stop."""
    return [agreed(False), agreed(int(os.environ["RANK"]) == rank)]


@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_request_to_one_rank_is_heard_by_all(world_size: int, rank: int) -> None:
    assert run_ranks(world_size, answers, rank) == [[False, True]] * world_size
