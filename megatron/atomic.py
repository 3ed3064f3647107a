"""Files that appear complete or not at all.

A file is written under a temporary name beside its place, and renamed into it at the end. Whoever
opens the name meanwhile finds the old file, or none. Several that belong together are all written
before the first of them is renamed. Any number of processes may write the same
name at once: each writes a file of its own, and the last rename wins.

A writer that is killed leaves its temporary file. It held a lock on it, which ended with it, and so
the next writer of the same name can tell the file from one that is still being written:

    .NAME.HOST.HEX.tmp      locked: somebody writes it; not locked: left over, removed
"""

import fcntl
import glob
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from megatron.errors import DiskError

_FOREIGN_SECONDS = 3600.0
"""Age of another host's leftovers; some file systems keep locks to one host."""


def make_folder(folder: Path) -> None:
    """Make ``folder`` and those above it, unless they are there.

    Raises:
        DiskError: if that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{folder}: cannot be made: {error.strerror or error}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the name ``path`` when the body ends, or is removed when it fails.

    Raises:
        DiskError: if the file cannot be written. The body should do nothing but write, since any
            OSError of it is taken for a failure to write.
    """
    temporary: Path | None = None
    try:
        _remove_leftovers(path)
        temporary, file = _open_temporary(path)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            # What went wrong is told, and not that its traces cannot be removed either.
            with suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise DiskError(f"{path}: cannot be written: {reason}") from error
        raise


def _host() -> str:
    return platform.node().replace(".", "-")


def _open_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A new file for what is to become ``path``, and its name."""
    while True:
        temporary = path.with_name(f".{path.name}.{_host()}.{uuid4().hex}.tmp")
        file = temporary.open("xb", buffering=1 << 20)
        # Without locks, as some network file systems are, leftovers stay.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        # Before the lock, another writer may have taken the file for a leftover.
        if temporary.exists():
            return temporary, file
        file.close()


def _remove_leftovers(path: Path) -> None:
    """Remove what killed writers of ``path`` have left, as far as it can be told and removed."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError), leftover.open("rb") as file:
            host = leftover.name.split(".")[-3]
            age = time.time() - leftover.stat().st_mtime
            if host == _host() or age > _FOREIGN_SECONDS:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()


@contextmanager
def atomic_writes(*paths: Path) -> Iterator[dict[Path, BinaryIO]]:
    """Open files that take their names when the body ends, in the order of ``paths``, or are all
    removed when it fails: none appears unless all could be written.

    Raises:
        DiskError: as ``atomic_write`` does.
    """
    for path in paths:
        # No file can take the name of a folder, which would be found when others have appeared.
        if path.is_dir():
            raise DiskError(f"{path}: cannot be written: is a folder")
    with ExitStack() as stack:
        files = {path: stack.enter_context(atomic_write(path)) for path in reversed(paths)}
        yield files
        for path, file in files.items():
            try:
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise DiskError(f"{path}: cannot be written: {error.strerror}") from error
