"""One run holds a run folder: who is refused, who takes over, and that it is never two.

A holder on another machine is one whose name and boot differ, as the lock sees them.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from megatron.errors import ConfigError, DiskError
from megatron.training.run_lock import (
    LOCK_FILE,
    TAKEOVER_FILE,
    Holder,
    RunLock,
    this_process,
)
from tests.figures import Figure

PATIENCE, BEAT, POLL = 0.4, 0.02, 0.01
Lock = partial(RunLock, patience=PATIENCE, beat=BEAT, poll=POLL)


def elsewhere(number: int = 1) -> Holder:
    """This process, had it run on another machine."""
    return replace(this_process(), host=f"node{number}", boot=f"boot {number}")


def acquire(lock: RunLock) -> float:
    """Take the folder; seconds that it took."""
    started = time.monotonic()
    while not lock.try_acquire():
        assert time.monotonic() < started + 20
    return time.monotonic() - started


@contextmanager
def holding(folder: Path, me: Holder | None = None) -> Iterator[RunLock]:
    lock = Lock(folder, me)
    acquire(lock)
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def dead_process(reaped: bool) -> Iterator[Holder]:
    """A process of this machine that was killed, as holder; a zombie until it is reaped."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        if reaped:
            process.wait()
        yield replace(this_process(), pid=process.pid, started=started)


def abandon(folder: Path, holder: Holder) -> bytes:
    """Leave the lock that ``holder`` had when it was killed."""
    with holding(folder, holder):
        content = (folder / LOCK_FILE).read_bytes()
    (folder / LOCK_FILE).write_bytes(content)
    return content


@pytest.mark.parametrize("place", ["here", "elsewhere"])
def test_second_start_is_refused_by_name(tmp_path: Path, place: str) -> None:
    me = this_process() if place == "here" else elsewhere()
    with holding(tmp_path, me) as lock:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ConfigError) as caught:
            acquire(Lock(tmp_path))
        lock.check()
        assert sorted(tmp_path.iterdir()) == before
    message = str(caught.value)
    assert message.startswith(f"folder {tmp_path} is held by another run: process {me.pid} on ")
    assert f"on host {me.host}, since 20" in message


@pytest.mark.parametrize("path", ["", "new", "new/and/deep"])
def test_folder_is_left_as_it_was(tmp_path: Path, path: str) -> None:
    folder = tmp_path / path
    with holding(folder):
        assert [name.name for name in folder.iterdir()] == [LOCK_FILE]
    assert list(tmp_path.rglob("*")) == []
    assert tmp_path.is_dir()


def test_folder_that_was_made_stays_with_what_is_in_it(tmp_path: Path) -> None:
    with holding(tmp_path / "new/run"):
        (tmp_path / "new/run/config.yaml").write_text("")
    assert [path.name for path in (tmp_path / "new/run").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("reaped", [True, False])
def test_lock_of_a_killed_process_of_this_machine_is_taken_over_at_once(
    tmp_path: Path, reaped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with dead_process(reaped) as holder:
        abandon(tmp_path, holder)
        lock = RunLock(tmp_path)
        assert lock.try_acquire(), "without waiting"
        lock.check()
        lock.release()
    assert f"took {tmp_path} over from process {holder.pid} on host" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_another_process_of_the_same_number_does_not_hold_the_lock(tmp_path: Path) -> None:
    abandon(tmp_path, replace(this_process(), started="1"))
    lock = RunLock(tmp_path)
    assert lock.try_acquire()
    lock.release()


def test_silent_holder_elsewhere_is_taken_over_after_the_stated_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    abandon(tmp_path, elsewhere())
    lock = Lock(tmp_path)
    assert PATIENCE <= acquire(lock) < 10 * PATIENCE
    assert caplog.text.count(f"waiting up to {PATIENCE:g} s for a sign of life of process") == 1
    lock.check()
    lock.release()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "noise"])
def test_damaged_lock_is_watched_like_one_from_elsewhere(tmp_path: Path, damage: str) -> None:
    content = abandon(tmp_path, this_process())
    damaged = {
        "flip": content.replace(b'"pid"', b'"pie"'),
        "cut": content[:40],
        "empty": b"",
        "noise": bytes(range(256)),
    }
    (tmp_path / LOCK_FILE).write_bytes(damaged[damage])
    lock = Lock(tmp_path)
    assert acquire(lock) >= PATIENCE
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_damaged_lock_of_a_holder_that_lives_is_not_taken_over(tmp_path: Path) -> None:
    with holding(tmp_path) as lock:
        with (tmp_path / LOCK_FILE).open("r+b") as file:
            file.write(b"X")
        with pytest.raises(ConfigError, match=r"its run\.lock is damaged, but renewed"):
            acquire(Lock(tmp_path))
        lock.check()


def test_holder_that_was_suspended_finds_out_and_cannot_disturb_its_successor(
    tmp_path: Path,
) -> None:
    silent = RunLock(tmp_path, elsewhere(), beat=1000)
    acquire(silent)
    with holding(tmp_path) as successor:
        with pytest.raises(DiskError, match="this run has lost it, perhaps because it was susp"):
            silent.check()
        silent.release()
        successor.check()


def test_removed_lock_is_noticed(tmp_path: Path) -> None:
    with holding(tmp_path) as lock:
        (tmp_path / LOCK_FILE).unlink()
        with pytest.raises(DiskError, match="the lock is gone"):
            lock.check()


@pytest.mark.parametrize("content", [b"", b"half a li"])
def test_takeover_that_was_killed_does_not_block_the_next(tmp_path: Path, content: bytes) -> None:
    with dead_process(reaped=True) as holder:
        abandon(tmp_path, holder)
        (tmp_path / TAKEOVER_FILE).write_bytes(content)
        lock = Lock(tmp_path)
        acquire(lock)
        lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", ["link", "pipe", "folder"])
def test_what_cannot_be_a_lock_is_refused_without_waiting(tmp_path: Path, make: str) -> None:
    path = tmp_path / LOCK_FILE
    if make == "link":
        path.symlink_to("/dev/zero")
        reason = "symbolic links"
    elif make == "folder":
        path.mkdir()
        reason = "Is a directory"
    else:
        os.mkfifo(path)
        lock = Lock(tmp_path)
        assert acquire(lock) >= PATIENCE, "an empty one"
        lock.release()
        return
    with pytest.raises(DiskError, match=reason):
        acquire(Lock(tmp_path))


def test_folder_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, reason in (("file", "File exists"), ("file/run", "Not a directory")):
        with pytest.raises(DiskError, match=f"{path} cannot be written: {reason}"):
            acquire(Lock(tmp_path / path))


class Contest:
    """Starts that want one folder at the same time, each on a machine of its own or on this one."""

    def __init__(self, folder: Path, stay: bool) -> None:
        self._folder = folder
        self._stay = threading.Event() if stay else None
        self._inside = 0
        self.most_inside = self.holders = self.refused = 0
        self._mutex = threading.Lock()

    def enter(self, holder: Holder) -> None:
        lock = Lock(self._folder, holder)
        try:
            acquire(lock)
        except ConfigError:
            with self._mutex:
                self.refused += 1
            return
        with self._mutex:
            self._inside += 1
            self.holders += 1
            self.most_inside = max(self.most_inside, self._inside)
        while self._stay is not None and self.refused < 9:
            time.sleep(POLL)
        lock.check()
        with self._mutex:
            self._inside -= 1
        lock.release()


def contest(folder: Path, stale: str, stay: bool) -> Contest:
    """Ten starts, five of them on this machine; the lock of a dead one is there, or none."""
    if stale == "here":
        abandon(folder, replace(this_process(), started="1"))
    elif stale == "elsewhere":
        abandon(folder, elsewhere(99))
    result = Contest(folder, stay)
    starts = [elsewhere(number) if number % 2 else this_process() for number in range(10)]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(result.enter, starts))
    assert [path.name for path in folder.iterdir()] == []
    return result


@pytest.mark.parametrize("stale", ["none", "here", "elsewhere"])
def test_one_of_ten_starts_gets_the_folder(tmp_path: Path, stale: str, figure: Figure) -> None:
    found = contest(tmp_path, stale, stay=True)
    assert (found.holders, found.refused, found.most_inside) == (1, 9, 1)
    figure("starts that want one folder", starts=10, holders=1, refused=9)


@pytest.mark.parametrize("rounds", [5, pytest.param(200, marks=pytest.mark.nightly)])
def test_never_two_hold_the_folder_while_it_changes_hands(
    tmp_path: Path, rounds: int, figure: Figure
) -> None:
    holders = most = 0
    for number in range(rounds):
        found = contest(tmp_path, ("none", "here", "elsewhere")[number % 3], stay=False)
        assert found.holders + found.refused == 10
        holders, most = holders + found.holders, max(most, found.most_inside)
    assert most == 1
    figure("folder that changes hands", starts=10 * rounds, holders=holders, at_once=most)
