"""Files that appear complete or not at all.

A file is written under a temporary name beside its place, and renamed into it at the end. Whoever
opens the name meanwhile finds the old file, or none. Any number of processes may write the same
name at once: each writes a file of its own, and the last rename wins.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from megatron.errors import DiskError


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
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("xb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
