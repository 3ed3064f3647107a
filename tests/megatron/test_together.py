"""All ranks return, or all raise."""

import time
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import pytest
import torch.distributed as dist

from megatron.errors import DataError, PeerError, RunError
from megatron.together import (
    gather_on_first,
    receive,
    run_everywhere,
    run_on_first,
    run_patiently,
    run_together,
    send,
)
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
    assert gather_on_first(lambda: 3, None) == [3]
    assert run_patiently(lambda: 3, None) == 3


WAYS: dict[str, Callable[..., object]] = {
    "everywhere": run_everywhere,
    "together": run_together,
    "gather": gather_on_first,
    "patiently": run_patiently,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_fails_everywhere_with_the_error_of_the_first_that_failed(way: str) -> None:
    assert run_ranks(3, check_way, way) == ["broken on 1"] * 3


def check_way(way: str) -> str:
    with pytest.raises(RunError) as caught:
        WAYS[way](lambda: fail([1, 2], DataError), world())
    return str(caught.value)


def test_results_are_gathered_on_the_first_rank_only() -> None:
    assert run_ranks(3, check_gather) == [[0, 10, 20], [], []]


def check_gather() -> list[int]:
    return gather_on_first(lambda: 10 * rank(), world())


def test_what_cannot_be_sent_fails_everywhere_before_it_is_sent() -> None:
    first, second = run_ranks(2, check_not_portable)
    assert first[0] is not PeerError
    assert second[0] is PeerError
    assert second[1].startswith("rank 0 failed: ")


def check_not_portable() -> tuple[type[Exception], str]:
    with pytest.raises(Exception, match="pickle|rank 0 failed") as caught:
        run_on_first(lambda: lambda: 3, world())
    return caught.type, str(caught.value)


def test_long_work_outlasts_the_patience_of_collectives() -> None:
    assert run_ranks(2, check_patience) == [0, 1]


def check_patience() -> int:
    impatient = dist.new_group(backend="gloo", timeout=timedelta(seconds=0.6))
    assert isinstance(impatient, dist.ProcessGroup)
    seconds = 1.5 if rank() == 0 else 0.0

    def work() -> int:
        time.sleep(seconds)
        return rank()

    return run_patiently(work, impatient)


def test_arrays_are_sent_as_they_are() -> None:
    assert run_ranks(2, check_send) == [True, True]


def check_send() -> bool:
    group = world()
    assert group is not None
    arrays = {
        "empty": np.empty((0, 3), np.float32),
        "numbers": np.arange(100_000, dtype=np.uint32),
        "read-only": np.frombuffer(b"abc", np.uint8),
        "strided": np.arange(20)[::2],
    }
    if rank() == 0:
        send(("some", arrays), 1, group)
        return True
    name, received = receive(0, group)
    assert name == "some"
    return all(
        received[key].dtype == array.dtype and np.array_equal(received[key], array)
        for key, array in arrays.items()
    )
