"""Token sequences in a pair of files, PREFIX.bin and PREFIX.idx, read without loading them.

The format is Megatron's memory-mapped one, version 1. The .bin file holds the tokens of all
sequences, one after another, and nothing else. The .idx file, little-endian, tells where they are,
for n sequences and d document boundaries:

    offset     type        content
    0          9 bytes     b"MMIDIDX" and two zero bytes
    9          uint64      version, 1
    17         uint8       code of the token dtype, see DTYPE_CODES
    18         uint64      n
    26         uint64      d
    34         int32[n]    length of each sequence, in tokens
    34 + 4n    int64[n]    where each sequence begins in .bin, in bytes
    34 + 12n   int64[d]    first sequence of each document; the last entry closes the last document
"""

import hashlib
import struct
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from megatron.atomic import atomic_write
from megatron.errors import DataError, DiskError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}

_SEQUENCES_AT_ONCE = 1 << 20


def dtype_for_vocab(vocab_size: int) -> np.dtype[Any]:
    """The dtype that Megatron stores tokens of a vocabulary in: uint16 below 65500, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    """The file of tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The file that tells where the sequences are."""
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """The sequences of PREFIX.bin and PREFIX.idx, memory-mapped.

    ``len(dataset)`` is the number of sequences, and ``dataset[i]`` the tokens of one: a read-only
    view, 1-d, of the dtype of the file.

    Attributes:
        prefix: path of both files without their suffixes.
        dtype: dtype of the tokens.
        sizes: tokens in each sequence, int32 ``(sequences,)``.
        document_boundaries: first sequence of each document, and the end of the last, int64
            ``(documents + 1,)``.
        tokens: the tokens of all sequences, one after another, 1-d.

    Args:
        fingerprint: that of the files, if they have been checked before; else they are now.

    Raises:
        DataError: if a file is missing or unreadable, or is not what the format asks for.
    """

    def __init__(self, prefix: str | Path, fingerprint: str | None = None) -> None:
        self.prefix = Path(prefix)
        index = _map(idx_path(prefix))
        self.dtype, sequences, documents = _read_header(idx_path(prefix), index)
        self.sizes = np.frombuffer(index, "<i4", sequences, HEADER.size)
        self._pointers = np.frombuffer(index, "<i8", sequences, HEADER.size + 4 * sequences)
        self.document_boundaries = np.frombuffer(
            index, "<i8", documents, HEADER.size + 12 * sequences
        )
        self._index = index
        data = _map(bin_path(prefix))
        whole = len(data) // self.dtype.itemsize * self.dtype.itemsize
        self.tokens = np.frombuffer(data[:whole], self.dtype)
        if fingerprint is not None:
            self.fingerprint = fingerprint
            return
        num_tokens = _check_sequences(
            idx_path(prefix), self.sizes, self._pointers, self.dtype.itemsize
        )
        _check_boundaries(idx_path(prefix), self.document_boundaries, sequences)
        expected = num_tokens * self.dtype.itemsize
        if len(data) != expected:
            raise DataError(
                f"{bin_path(prefix)}: has {len(data)} bytes, but {idx_path(prefix).name} describes "
                f"{num_tokens} tokens of {self.dtype}, which are {expected} bytes"
            )

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> NDArray[np.integer[Any]]:
        return self.get(range(len(self))[index])

    def get(
        self, index: int, offset: int = 0, length: int | None = None
    ) -> NDArray[np.integer[Any]]:
        """``length`` tokens of a sequence from ``offset`` on, or all that follow, if any."""
        first = int(self._pointers[index]) // self.dtype.itemsize
        stop = first + int(self.sizes[index])
        first = min(first + offset, stop)
        return self.tokens[first : stop if length is None else min(stop, first + length)]

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that identify the data: BLAKE2b of the bytes of .idx and the size of .bin.

        Equal for copies under any name. Two datasets with sequences of equal lengths are not told
        apart, for which there is the hash of the content; the order of samples, which follows from
        the lengths alone, is the same for both.
        """
        digest = hashlib.blake2b(self._index.data, digest_size=16)
        digest.update(struct.pack("<Q", self.tokens.nbytes))
        return digest.hexdigest()


def _map(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file, read-only."""
    try:
        if path.stat().st_size == 0:
            # An empty file cannot be mapped.
            return np.empty(0, np.uint8)
        return np.asarray(np.memmap(path, np.uint8, mode="r"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_header(path: Path, index: NDArray[np.uint8]) -> tuple[np.dtype[Any], int, int]:
    """Token dtype, number of sequences and number of document boundaries."""
    if len(index) < HEADER.size:
        raise DataError(
            f"{path}: has {len(index)} bytes, but an index begins with {HEADER.size} bytes"
        )
    magic, version, code, sequences, documents = HEADER.unpack_from(index.data)
    if magic != MAGIC:
        raise DataError(f"{path}: begins with {magic!r}, but an index begins with {MAGIC!r}")
    if version != VERSION:
        raise DataError(f"{path}: has version {version}, expected {VERSION}")
    if code not in DTYPE_CODES:
        known = ", ".join(f"{code} ({dtype.name})" for code, dtype in DTYPE_CODES.items())
        raise DataError(f"{path}: has dtype code {code}, expected one of {known}")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if len(index) != expected:
        raise DataError(
            f"{path}: has {len(index)} bytes, but its header describes {sequences} sequences and "
            f"{documents} document boundaries, which are {expected} bytes"
        )
    return DTYPE_CODES[code], sequences, documents


def _check_sequences(
    path: Path, sizes: NDArray[np.int32], pointers: NDArray[np.int64], itemsize: int
) -> int:
    """Refuse sequences that do not lie one after another; return the number of tokens."""
    num_tokens = 0
    # In parts, because the index of a large corpus has gigabytes.
    for first in range(0, len(sizes), _SEQUENCES_AT_ONCE):
        part = sizes[first : first + _SEQUENCES_AT_ONCE]
        if part.min() < 0:
            at = first + int(part.argmin())
            raise DataError(f"{path}: sequence {at} has {sizes[at]} tokens, expected 0 or more")
        ends = num_tokens + np.cumsum(part, dtype=np.int64)
        starts = (ends - part) * itemsize
        wrong = np.flatnonzero(pointers[first : first + len(part)] != starts)
        if len(wrong) > 0:
            at = int(wrong[0])
            raise DataError(
                f"{path}: sequence {first + at} begins at byte {pointers[first + at]}, but the "
                f"sequences before it end at byte {starts[at]}"
            )
        num_tokens = int(ends[-1])
    return num_tokens


def _check_boundaries(path: Path, boundaries: NDArray[np.int64], sequences: int) -> None:
    rises = len(boundaries) > 0 and boundaries[0] == 0 and bool((np.diff(boundaries) >= 0).all())
    if not rises or boundaries[-1] > sequences:
        shown = np.array2string(boundaries, threshold=6, edgeitems=2, separator=", ")
        raise DataError(
            f"{path}: has the document boundaries {shown}, "
            f"expected them to rise from 0 to at most {sequences}, the number of sequences"
        )


class IndexedDatasetWriter:
    """Writes PREFIX.bin and PREFIX.idx, as a context manager.

    Tokens stream to the disk, so that memory stays small. Both files appear, complete, when the
    context ends, and replace older ones; if it ends by an exception, nothing has changed.

    Example:
        with IndexedDatasetWriter("corpus", dtype_for_vocab(250880)) as writer:
            writer.add([5, 6, 7])
            writer.end_document()
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        codes = [code for code, known in DTYPE_CODES.items() if known == self.dtype]
        if not codes:
            raise DataError(f"{bin_path(prefix)}: tokens cannot be stored as {self.dtype}")
        self._code = codes[0]
        self._sizes = array("i")
        self._boundaries = array("q", [0])
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._file = self._stack.enter_context(atomic_write(bin_path(self.prefix)))
        return self

    def add(self, tokens: ArrayLike) -> None:
        """Append one sequence of token ids, 1-d.

        Raises:
            DataError: if a token id does not fit the dtype.
        """
        given = np.asarray(tokens)
        stored = np.ascontiguousarray(given, self.dtype)
        if given.dtype != self.dtype and (stored != given).any():
            wrong = given[stored != given][0]
            raise DataError(f"{bin_path(self.prefix)}: token id {wrong} does not fit {self.dtype}")
        self._file.write(stored.data)
        self._sizes.append(len(stored))

    def end_document(self) -> None:
        """Let the sequences added since the last document be one document."""
        self._boundaries.append(len(self._sizes))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, traceback)
            return
        with self._stack:
            # The new .bin must never be seen with an old .idx.
            _remove(idx_path(self.prefix))
        with atomic_write(idx_path(self.prefix)) as file:
            for part in self._index():
                file.write(part)

    def _index(self) -> Iterator[bytes]:
        sizes = np.frombuffer(self._sizes, np.int32)
        ends = np.cumsum(sizes, dtype=np.int64)
        yield HEADER.pack(MAGIC, VERSION, self._code, len(sizes), len(self._boundaries))
        yield sizes.astype("<i4").tobytes()
        yield ((ends - sizes) * self.dtype.itemsize).astype("<i8").tobytes()
        yield np.frombuffer(self._boundaries, np.int64).astype("<i8").tobytes()


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(f"{path}: cannot be replaced: {error.strerror or error}") from error
