"""All ranks return, or all raise."""

import pytest

from megatron.errors import DataError, PeerError
from megatron.together import run_on_first, run_together
from tests.distributed import run_ranks
from tests.megatron.checkpoint.sample import world


def rank() -> int:
    group = world()
    assert group is not None
    return group.rank()


def fail(ranks: list[int], error: type[Exception]) -> str:
    if rank() in ranks:
        raise error(f"broken on {rank()}")
    return "fine"


def test_results_come_in_the_order_of_the_ranks() -> None:
    assert run_ranks(3, check_results) == [([0, 10, 20], 0)] * 3


def check_results() -> tuple[list[int], int]:
    return run_together(lambda: 10 * rank(), world()), run_on_first(rank, world())


def test_first_failing_rank_is_heard_by_all() -> None:
    assert run_ranks(3, check_failure) == ["broken on 1"] * 3


def check_failure() -> str:
    with pytest.raises(DataError) as caught:
        run_together(lambda: fail([1, 2], DataError), world())
    return str(caught.value)


def test_failure_of_the_first_rank_alone_is_heard_by_all() -> None:
    assert run_ranks(2, check_failure_on_first) == ["broken on 0"] * 2


def check_failure_on_first() -> str:
    with pytest.raises(DataError) as caught:
        run_on_first(lambda: fail([0, 1], DataError), world())
    return str(caught.value)


def test_bug_keeps_its_own_error_and_the_others_learn_where_it_is() -> None:
    first, second = run_ranks(2, check_bug)
    assert first == (PeerError, "rank 1 failed: KeyError: 'broken on 1'")
    assert second == (KeyError, "'broken on 1'")


def check_bug() -> tuple[type[Exception], str]:
    with pytest.raises((PeerError, KeyError)) as caught:
        run_together(lambda: fail([1], KeyError), world())
    return caught.type, str(caught.value)


def test_process_without_a_group_is_alone() -> None:
    assert run_together(lambda: 3, None) == [3]
    assert run_on_first(lambda: 3, None) == 3
