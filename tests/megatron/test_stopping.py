"""Signals are heeded for the length of a run, and given back after it."""

import os
import signal
import threading
import time
from typing import Any

import pytest

from megatron.errors import StoppedOnRequestError
from megatron.stopping import NOTHING_CHANGED, SIGNALS, StopSignals


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_before_the_first_step_ends_what_is_done(number: signal.Signals) -> None:
    done: list[str] = []
    with pytest.raises(StoppedOnRequestError, match=f"^{NOTHING_CHANGED}$"), StopSignals():
        work(number, done)
    assert done == ["cleaned up"]


def work(number: signal.Signals, done: list[str]) -> None:
    try:
        send(number)
        time.sleep(5)
        done.append("went on")
    except Exception:
        done.append("took it for an error")
    finally:
        done.append("cleaned up")


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_after_that_is_noted(number: signal.Signals) -> None:
    with StopSignals() as signals:
        signals.only_note()
        assert not signals.received
        send(number)
        assert signals.received


def test_second_interrupt_interrupts_at_once() -> None:
    with StopSignals() as signals:
        signals.only_note()
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_ignored_hangup_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            send(signal.SIGHUP)
            assert not signals.received
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_go_without() -> None:
    found: list[Any] = []

    def run() -> None:
        with StopSignals() as signals:
            found.append(signals.received)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]


def test_forked_process_is_asked_to_stop_by_itself() -> None:
    with StopSignals() as signals:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        time.sleep(0.2)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
        assert not signals.received


def test_process_that_waits_inside_a_library_is_ended_from_a_thread() -> None:
    """Python runs no handlers there; one that does nothing stands for it."""
    told: list[str] = []
    heard = threading.Event()

    def leave(error: StoppedOnRequestError) -> None:
        told.append(str(error))
        heard.set()

    with StopSignals(leave):
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
        send(signal.SIGTERM)
        assert heard.wait(10)
    assert told == [NOTHING_CHANGED]
