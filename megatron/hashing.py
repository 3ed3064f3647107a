"""Hashes of large files and arrays, which several cores share.

A hash is SHA-256 in hexadecimal, which processors compute in hardware. That of a file is the hash
of the hashes of its parts, HASH_PART bytes each; an array has the hash of a file of its bytes.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HASH_DIGITS = 64
HASH_PART = 8 * 2**20
HASH_THREADS = 8


def digest(data: bytes | memoryview) -> bytes:
    """SHA-256 of ``data``."""
    return hashlib.sha256(data).digest()


def hash_file(
    path: Path,
    start: int = 0,
    stop: int | None = None,
    look: Callable[[bytes], object] | None = None,
) -> str:
    """Hash of the bytes from ``start`` to ``stop`` of the file ``path``, by default of all.

    Args:
        look: is shown each part, by any of several threads.

    Raises:
        OSError: if the file cannot be read, or becomes shorter meanwhile.
    """
    with path.open("rb") as file:
        descriptor = file.fileno()
        end = os.fstat(descriptor).st_size if stop is None else stop

        def part(offset: int) -> bytes:
            data = _read(descriptor, offset, min(HASH_PART, end - offset))
            if look is not None:
                look(data)
            return digest(data)

        return _combine(part, range(start, end, HASH_PART))


def hash_array(array: NDArray[Any]) -> str:
    """Hash of the bytes of ``array``, which lies in one piece."""
    data = array.reshape(-1).view(np.uint8).data
    return _combine(
        lambda offset: digest(data[offset : offset + HASH_PART]), range(0, len(data), HASH_PART)
    )


def _combine(part: Callable[[int], bytes], offsets: Iterable[int]) -> str:
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return digest(b"".join(pool.map(part, offsets))).hex()


def _read(descriptor: int, offset: int, length: int) -> bytes:
    data = os.pread(descriptor, length, offset)
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            raise OSError(f"ends at byte {offset + len(data)}, before it was read")
        data += more
    return data
