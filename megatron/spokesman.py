"""One of the ranks says why they end, and the others leave once it has.

A launcher that sees the first rank leave ends all others. If only rank 0 might speak, and another
were faster, nobody would have said a word. So whichever rank comes first speaks, and those after it
wait until it has, and are silent.

They agree by a file in the folder for temporary files, which exists before they have met: they lock
it one after another, and whoever finds it empty speaks and leaves a mark in it. A speaker that is
killed loses the lock, and the next one speaks. Where there is no such file, every rank speaks:
better twice than never. Ranks on several machines agree by their store too, once they have met.
"""

import fcntl
import hashlib
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron.environment import find_launch, start_of

_PATIENCE = 5.0
"""Seconds that a rank waits for another to have spoken."""
_STORE_SECONDS = 1.0
_RETRY_SECONDS = 0.02
_OLD_SECONDS = 24 * 3600.0

Claim = Callable[[], bool]
"""Whether this machine is the first to speak; may wait for ever."""


class Spokesman:
    """Lets one rank of a launch speak.

    Args:
        launch: what the ranks of this launch have in common; None for a process that is alone.

    Attributes:
        is_alone: the process has no other ranks.
    """

    def __init__(self, launch: str | None) -> None:
        self.is_alone = launch is None
        # Where nobody tells when a process was started, a mark might be of an earlier run.
        agrees = launch is not None and start_of(os.getpid()) is not None
        self._path = _path(str(launch)) if agrees else None
        self._path_before: Path | None = None
        self._met = 0.0
        self._claim: Claim | None = None
        self._spoken = False

    @classmethod
    def of_process(cls) -> "Spokesman":
        """The one of the launcher that has started this process."""
        return cls(find_launch())

    def meet(self, run: str, claim: Claim | None) -> None:
        """From now on speak once in ``run``, a name that no other run ever has.

        Args:
            claim: asked on each machine before its first word; None where there is only one.
        """
        if self._path is not None:
            self._path_before, self._path = self._path, _path(run)
            self._met, self._claim = _now(), claim

    def say(self, speak: Callable[[], None]) -> None:
        """Call ``speak`` in one of the ranks; return once it has spoken, in whichever."""
        if self._path is None:
            speak()
        elif self._spoken:
            return
        else:
            self._say_once(self._path, speak)
        self._spoken = True

    def has_spoken(self) -> bool:
        """Whether a rank of this machine has spoken."""
        if self._spoken or self._path is None:
            return self._spoken
        return _mark(_read(self._path)) > 0 or self._has_left_before()

    def _has_left_before(self) -> bool:
        """Whether a rank spoke that had not heard yet that all have met."""
        if self._path_before is None:
            return False
        return 0 < _mark(_read(self._path_before)) < self._met + _PATIENCE

    def _say_once(self, path: Path, speak: Callable[[], None]) -> None:
        try:
            file = _open(path)
        except OSError:
            speak()
            return
        try:
            # A speaker that takes too long is as good as none.
            locked = _lock(file)
            told = _mark(os.pread(file, 64, 0)) > 0 or self._has_left_before()
            if not (locked and told):
                if self._claim is None or _within(_STORE_SECONDS, self._claim):
                    speak()
                os.pwrite(file, f"{_now():.2f}\n".encode(), 0)
        finally:
            os.close(file)


def _path(launch: str) -> Path:
    digest = hashlib.sha256(launch.encode()).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"megatron-{os.getuid()}" / digest


def _open(path: Path) -> int:
    """Open the file of a launch, in a folder that is of this user alone.

    Raises:
        OSError: if it cannot be, or another user has put something in its place.
    """
    folder = path.parent
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} is not a folder of this user")
    _remove_old(folder)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _read(path: Path) -> bytes:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.pread(file, 64, 0)
    finally:
        os.close(file)


def _remove_old(folder: Path) -> None:
    """Remove the files of launches that have ended long ago."""
    for path in folder.iterdir():
        try:
            if time.time() - path.lstat().st_mtime > _OLD_SECONDS:
                path.unlink()
        except OSError:
            # Another rank was faster.
            continue


def _lock(file: int) -> bool:
    """Lock ``file``; False if another rank holds it for too long, or it cannot be."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_RETRY_SECONDS)
        except OSError:
            # The file system has no locks.
            return False
        else:
            return True


def _mark(content: bytes) -> float:
    """When a rank spoke; 0 if none did since this process was started, but one of another run."""
    started = start_of(os.getpid())
    try:
        marked = float(content)
    except ValueError:
        return 0.0
    of_this_run = started is not None and marked >= started / os.sysconf("SC_CLK_TCK")
    return marked if of_this_run else 0.0


def _now() -> float:
    """Seconds since the machine was started, as the starts of processes are told."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _within(seconds: float, claim: Claim) -> bool:
    """What ``claim`` answers; True if it does not answer, or fails."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            answers.append(claim())
        except Exception:
            # A store that went away with the rank that held it.
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else True
