"""The ranks of one attempt agree on a name, whatever those of an earlier one have left."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron.environment import RankEnvironment
from megatron.meeting import Meeting, meet

RANKS = 3
SECONDS = 30.0


@pytest.fixture
def launcher() -> TCPStore:
    """A launcher that listens, as torchrun does over all its attempts."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def attempt(launcher: TCPStore, ranks: int = RANKS) -> list[Meeting]:
    environments = [
        RankEnvironment(rank, ranks, rank, f"127.0.0.1:{launcher.port}", launcher_listens=True)
        for rank in range(ranks)
    ]
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda environment: meet(SECONDS, environment), environments))


def test_ranks_agree_on_a_name(launcher: TCPStore) -> None:
    met = attempt(launcher)
    assert len({meeting.run for meeting in met}) == 1
    assert [meeting.machines for meeting in met] == [1] * RANKS


@pytest.mark.parametrize("ranks", [RANKS, RANKS - 1, RANKS + 1])
def test_each_attempt_has_a_name_and_a_store_of_its_own(launcher: TCPStore, ranks: int) -> None:
    """Also if there are more or fewer ranks than before."""
    first = attempt(launcher)
    first[0].store.set("address of rank 1", "gone")
    second = attempt(launcher, ranks)
    assert len({meeting.run for meeting in second}) == 1
    assert second[0].run != first[0].run
    second[0].store.set_timeout(timedelta(seconds=0.2))
    assert not second[0].store.check(["address of rank 1"])
    second[0].store.set("address of rank 1", "here")
    assert second[1].store.get("address of rank 1") == b"here"


def test_one_machine_of_several_is_the_first_to_speak(launcher: TCPStore) -> None:
    met = attempt(launcher)
    assert [meeting.is_first_to_speak() for meeting in met] == [True, False, False]


def test_lone_process_meets_itself() -> None:
    assert meet(SECONDS, RankEnvironment()).machines == 1
