"""Signals are noted on one rank and heard by all."""

import os
import signal

import pytest

from megatron.training.stopping import SIGNALS, StopRequest
from tests.distributed import run_ranks


def agreements(number: int, rank: int) -> list[bool]:
    """What the ranks agree on before and after ``rank`` gets a signal."""
    request = StopRequest()
    before = request.agreed()
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), number)
    return [before, request.agreed(), request.agreed()]


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_on_one_rank_is_heard_by_all(number: int) -> None:
    assert run_ranks(2, agreements, number, 1) == [[False, True, True]] * 2


def test_signal_to_a_lone_process_is_heard() -> None:
    assert run_ranks(1, agreements, signal.SIGTERM, 0) == [[False, True, True]]


def interrupts() -> list[bool]:
    """Which of several signals, one after another, interrupts."""
    StopRequest()
    interrupted = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
        try:
            os.kill(os.getpid(), number)
            interrupted.append(False)
        except KeyboardInterrupt:
            interrupted.append(True)
    return interrupted


def test_only_a_second_interrupt_in_a_row_interrupts_at_once() -> None:
    assert run_ranks(1, interrupts) == [[False, False, False, False, True]]
