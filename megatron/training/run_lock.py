"""One run holds a run folder: the lock that says which, and how it is found stale.

The lock is the file ``run.lock`` in the folder. Rank 0 of a run makes it before it reads a save and
removes it when it ends. Its first line says who holds it, its second how often the holder has shown
that it lives:

    {"host": "node7", "pid": 4711, "since": "2026-11-29T12:00:00+00:00", ..., "crc32": "8d3f01aa"}
    beat 0000000012

A file that exists cannot be made again (O_EXCL, which NFS keeps too), so that of several starts one
makes it. What the others do depends on where they are:

    holder                                     a newcomer
    same machine and process namespace         looks the process up, by number and start time:
                                               refused if it is there, takes over at once if not
    another machine, or the line is damaged    watches for PATIENCE seconds by its own clock:
                                               refused at the first change, then takes over

The holder writes a beat every BEAT seconds into the file that it has opened, not by its name, so
that a holder that was suspended cannot overwrite its successor. Clocks of two machines are never
compared, nor is advisory locking relied on, which shared file systems have or have not.

To take over, a newcomer makes ``run.lock.takeover`` in the same way, with its own lines, looks once
more whether the lock is the one that it has found stale, and renames the file over it. There is a
lock at any time, and of any number of newcomers one gets to rename; if that one dies before, its
file is found stale as a lock is. Whose line is in ``run.lock`` in the end holds the folder.

A holder that was suspended for longer than PATIENCE may have lost the folder meanwhile. It looks
before everything that it writes (``check``) and ends if so.
"""

import json
import logging
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch.distributed as dist

from megatron.errors import ConfigError, DiskError
from megatron.together import run_on_first

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
TAKEOVER_FILE = "run.lock.takeover"

PATIENCE = 60.0
"""Seconds without a sign of life after which a holder elsewhere is taken for dead."""
BEAT = 5.0
"""Seconds between two signs of life."""
_POLL = 0.5
"""Seconds between two looks at another's lock."""
_MOST_BYTES = 1 << 16
_MOST_VANISHED = 100
"""So often a folder or lock may vanish while it is looked at; a path that nobody can make does."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host: name of the machine, for people.
        boot: identifies the machine since it was started; "" where that is not known.
        namespace: of the process numbers on it; "" where that is not known.
        pid: number of the process.
        started: when the process started, in ticks of the machine; "" where that is not known.
        since: when it got the folder, for people.
        token: different for every lock.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str
    since: str = ""
    token: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, since {self.since}"


def this_process() -> Holder:
    """This process as the holder of a lock."""
    pid = os.getpid()
    return Holder(
        host=os.uname().nodename,
        boot=_read_text(Path("/proc/sys/kernel/random/boot_id")),
        namespace=_read_link(Path("/proc/self/ns/pid")),
        pid=pid,
        started=_start_of(pid)[1],
    )


class RunLock:
    """The lock of the run folder ``folder``, as one process sees it.

    Args:
        me: who wants it; the parameters exist so that tests can be on several machines.
    """

    def __init__(
        self,
        folder: Path,
        me: Holder | None = None,
        *,
        patience: float = PATIENCE,
        beat: float = BEAT,
        poll: float = _POLL,
    ) -> None:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self._me = replace(me or this_process(), since=since, token=token_hex(16))
        self._folder = folder
        self._path = folder / LOCK_FILE
        self._takeover = folder / TAKEOVER_FILE
        self._patience, self._beat, self._poll = patience, beat, poll
        self._seen: dict[Path, tuple[bytes, float]] = {}
        self._waits = False
        self._vanished = 0
        self._made: list[Path] = []
        self._descriptor: int | None = None
        self._stopped = threading.Event()
        self._heart: threading.Thread | None = None

    def try_acquire(self) -> bool:
        """Take the folder, which is made if need be. False after a moment if it is not known yet
        whether another run holds it: to be called again.

        Raises:
            ConfigError: if another run holds it.
            DiskError: if the folder or the lock cannot be written.
        """
        with _disk_errors(self._folder):
            try:
                self._make_folder()
                if self._make(self._path):
                    return self._settle()
                return self._judge_and_take_over()
            except FileNotFoundError:
                # What was there is gone: another has ended, and perhaps removed the folder.
                self._vanished += 1
                if self._vanished > _MOST_VANISHED:
                    raise
                return False

    def check(self) -> None:
        """Make sure that this process still holds the folder, before it writes there.

        Raises:
            DiskError: if another has taken it over, or it cannot be told.
        """
        with _disk_errors(self._folder):
            if self._is_mine():
                return
            found = None
            with suppress(FileNotFoundError):
                found = _decode(_read(self._path))
        now = "the lock is gone" if found is None else f"held by {found}"
        raise DiskError(
            f"folder {self._folder}: this run has lost it, perhaps because it was suspended: {now}"
        )

    def release(self) -> None:
        """Give the folder back, and remove it if it was made for the lock and nothing is in it."""
        self._stopped.set()
        if self._heart is not None:
            self._heart.join()
        if self._descriptor is not None:
            # A lock that cannot be removed will be found stale.
            with suppress(OSError):
                self._remove_own(self._path)
            os.close(self._descriptor)
            self._descriptor = None
        for folder in reversed(self._made):
            with suppress(OSError):
                folder.rmdir()

    def _make_folder(self) -> None:
        missing = [] if self._folder.is_dir() else [self._folder]
        while missing and not missing[-1].parent.exists():
            missing.append(missing[-1].parent)
        for folder in reversed(missing):
            try:
                folder.mkdir()
            except FileExistsError:
                if not folder.is_dir():
                    raise
            else:
                self._made.append(folder)

    def _make(self, path: Path) -> bool:
        """Make the lock or the takeover ``path``, unless it exists."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        try:
            _write_whole(descriptor, _encode(self._me) + _beat_line(0))
            os.fsync(descriptor)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = descriptor
        return True

    def _judge_and_take_over(self) -> bool:
        """See whether the holder of the lock lives, and take over from one that does not."""
        stale = self._stale_content(self._path)
        if stale is None:
            return False
        if not self._make(self._takeover):
            # Another is at it; if it has died there, it is in the way.
            left = self._stale_content(self._takeover)
            if left is not None and _read(self._takeover) == left:
                self._takeover.unlink(missing_ok=True)
            return False
        try:
            if _read(self._path) != stale:
                return False
            self._takeover.rename(self._path)
        finally:
            # After the rename there is nothing of that name, but that of the next. One that cannot
            # be removed will be found stale, and must not hide what went wrong before.
            with suppress(OSError):
                self._remove_own(self._takeover)
        held = self._settle()
        if held:
            logger.warning(
                "took %s over from %s, which has ended without giving it back",
                self._folder,
                _decode(stale) or f"a run of which {LOCK_FILE} is damaged",
            )
        return held

    def _stale_content(self, path: Path) -> bytes | None:
        """The content of the lock ``path`` if its holder is dead; None if that is not known yet.

        Raises:
            ConfigError: if the holder lives.
        """
        content = _read(path)
        holder = _decode(content)
        lives = None if holder is None else self._lives(holder)
        if lives is None:
            lives = self._watch(path, content, holder)
        if lives and path == self._path:
            raise ConfigError(
                f"folder {self._folder} is held by another run: "
                f"{holder or f'its {LOCK_FILE} is damaged, but renewed'}; "
                "end that one first, or choose another folder"
            )
        if lives is False:
            return content
        time.sleep(self._poll)
        return None

    def _lives(self, holder: Holder) -> bool | None:
        """Whether the process ``holder`` runs; None if that cannot be seen from here."""
        mine = self._me
        if not (mine.boot and mine.namespace and mine.started and holder.started):
            return None
        places = [(it.host, it.boot, it.namespace) for it in (mine, holder)]
        if places[0] != places[1]:
            return None
        exists, started = _start_of(holder.pid)
        if not exists:
            return False
        return started == holder.started if started else None

    def _watch(self, path: Path, content: bytes, holder: Holder | None) -> bool | None:
        """Whether ``content`` has changed since it was seen first; None while it is too early."""
        now = time.monotonic()
        before, since = self._seen.setdefault(path, (content, now))
        if content != before:
            same = holder is not None and holder == _decode(before)
            renewed = same or (holder is None and len(content) == len(before))
            self._seen[path] = (content, now)
            return True if renewed else None
        # Not at the first look, which may meet a lock that is just being written.
        if now > since and not self._waits:
            self._waits = True
            logger.info(
                "folder %s: waiting up to %g s for a sign of life of %s",
                self._folder,
                self._patience,
                holder or f"the run of which {LOCK_FILE} is damaged",
            )
        return False if now - since > self._patience else None

    def _settle(self) -> bool:
        """Begin to hold the folder, if the lock is this process's own by now."""
        if not self._is_mine():
            return False
        self._heart = threading.Thread(target=self._beat_on, name="run lock", daemon=True)
        self._heart.start()
        return True

    def _is_mine(self) -> bool:
        return self._is_own(self._path)

    def _remove_own(self, path: Path) -> None:
        if self._is_own(path):
            path.unlink(missing_ok=True)

    def _is_own(self, path: Path) -> bool:
        """Whether ``path`` is the file that this process has made."""
        assert self._descriptor is not None
        # Opened anew, because a shared file system looks at the server's file then.
        try:
            descriptor = _open(path)
        except FileNotFoundError:
            return False
        try:
            if os.path.samestat(os.fstat(descriptor), os.fstat(self._descriptor)):
                return True
            found = _decode(os.read(descriptor, _MOST_BYTES))
        finally:
            os.close(descriptor)
        return found is not None and found.token == self._me.token

    def _beat_on(self) -> None:
        assert self._descriptor is not None
        place, beat = len(_encode(self._me)), 0
        while not self._stopped.wait(self._beat):
            beat += 1
            # A disk that is away for a moment; for longer, and check() finds out what became of it.
            with suppress(OSError):
                os.pwrite(self._descriptor, _beat_line(beat), place)
                os.fsync(self._descriptor)


@contextmanager
def held(folder: Path, make: Callable[[Path], RunLock] = RunLock) -> Iterator[RunLock | None]:
    """Hold the run folder ``folder`` in the body. Collective over all ranks.

    Gives the lock on rank 0, and None on the others.

    Raises:
        ConfigError: on every rank, if another run holds it.
        DiskError: on every rank, if it cannot be written.
    """
    world = dist.group.WORLD
    lock = make(folder) if dist.get_rank() == 0 else None
    try:
        # In turns, so that the others wait for no longer than a moment at a time.
        while not run_on_first(lambda: lock is not None and lock.try_acquire(), world):
            pass
        yield lock
    finally:
        if lock is not None:
            lock.release()


def _encode(holder: Holder) -> bytes:
    body = json.dumps(asdict(holder)).encode("ascii").removesuffix(b"}")
    return b'%s, "crc32": "%08x"}\n' % (body, zlib.crc32(body))


def _decode(content: bytes) -> Holder | None:
    """Who is named in the first line of a lock; None if it is damaged or not written yet."""
    line, _, _ = content.partition(b"\n")
    body, _, ending = line.rpartition(b', "crc32": "')
    if ending != b'%08x"}' % zlib.crc32(body):
        return None
    try:
        fields: dict[str, Any] = json.loads(body + b"}")
        holder = Holder(**fields)
    except (ValueError, TypeError, RecursionError):
        return None
    texts = [value for name, value in fields.items() if name != "pid"]
    plain = all(isinstance(text, str) and text.isprintable() for text in texts)
    return holder if plain and type(holder.pid) is int and 0 < holder.pid < 2**31 else None


def _beat_line(number: int) -> bytes:
    return b"beat %010d\n" % number


def _open(path: Path) -> int:
    # Neither a link nor a pipe, which would wait for a writer, is a lock.
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)


def _read(path: Path) -> bytes:
    descriptor = _open(path)
    try:
        return os.read(descriptor, _MOST_BYTES)
    finally:
        os.close(descriptor)


def _write_whole(descriptor: int, content: bytes) -> None:
    if os.write(descriptor, content) != len(content):
        raise OSError(28, "No space left on device")


def _start_of(pid: int) -> tuple[bool, str]:
    """Whether process ``pid`` is there and has not ended, and when it started, if that is told."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False, ""
    except PermissionError:
        # Another user's.
        pass
    # The name in parentheses, which may hold anything, comes before the other fields.
    fields = _read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    if len(fields) < 20:
        return True, ""
    # A killed process stays as a zombie until its parent has asked for it.
    return fields[0] not in ("Z", "X"), fields[19]


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""


def _read_link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DiskError(f"folder {folder} cannot be written: {reason}") from error
