"""What the tokens of a dataset are: a hash of PREFIX.bin, and the smallest and the largest id.

One pass over the file finds all of it. It is kept between runs beside the orders of samples, under
a name that holds size, times and number of the file, so that a file that was written since is read
again. A file that was written a moment ago is read at every start until it has come to rest, since
a change within the resolution of the clock would not be seen.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.cache import ArrayCache, Arrays, ArraySpec, Stamp, cache_key, stamp
from megatron.data.indexed_dataset import IndexedDataset, bin_path, idx_path
from megatron.errors import DataError
from megatron.hashing import HASH_DIGITS, hash_file

_REST_SECONDS = 4.0
_SPECS = {
    "hash": ArraySpec((HASH_DIGITS // 2,), np.dtype(np.uint8)),
    "range": ArraySpec((2,), np.dtype(np.int64)),
}
_TOKENS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Content:
    """What is known of a dataset whose files have been read.

    Attributes:
        stamps: of the .bin and .idx files.
        fingerprint: of the .idx file.
        hash: of the .bin file.
        smallest, largest: token ids; 0 where there is none.
    """

    stamps: tuple[Stamp, Stamp]
    fingerprint: str
    hash: str
    smallest: int
    largest: int


@dataclass
class Findings:
    """What has been found out about the data of a run, to be shared by the ranks of a node.

    Attributes:
        contents: of the datasets, by their prefixes.
        cache: the orders of samples.
    """

    contents: dict[str, Content] = field(default_factory=dict)
    cache: ArrayCache = field(default_factory=ArrayCache)

    def open(self, prefix: str, folder: Path | None) -> tuple[IndexedDataset, Content]:
        """The dataset ``prefix`` and what is known of it; read now if that is nothing.

        Args:
            folder: where to keep what was found.

        Raises:
            DataError: if the files cannot be read, or are not what the format asks for.
        """
        known = self.contents.get(prefix)
        if known is not None and known.stamps == _stamps(prefix):
            return IndexedDataset(prefix, fingerprint=known.fingerprint), known
        dataset = IndexedDataset(prefix)
        self.contents[prefix] = _read(dataset, folder)
        return dataset, self.contents[prefix]


def read_content(dataset: IndexedDataset) -> tuple[str, int, int]:
    """Hash of the .bin file, and the smallest and the largest token id in it.

    Raises:
        DataError: if it cannot be read.
    """
    ranges: list[tuple[int, int]] = []

    def look(data: bytes) -> None:
        tokens = np.frombuffer(data, dataset.dtype)
        ranges.append((int(tokens.min()), int(tokens.max())))

    path = bin_path(dataset.prefix)
    try:
        found = hash_file(path, look=look)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    smallest = min((low for low, _ in ranges), default=0)
    return found, smallest, max((high for _, high in ranges), default=0)


def check_tokens(dataset: IndexedDataset, content: Content, vocab_size: int) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        DataError: naming the first of them and its place.
    """
    if content.smallest >= 0 and content.largest < vocab_size:
        return
    for first in range(0, len(dataset.tokens), _TOKENS_AT_ONCE):
        part = dataset.tokens[first : first + _TOKENS_AT_ONCE]
        wrong = np.flatnonzero((part < 0) | (part >= vocab_size))
        if len(wrong) > 0:
            raise DataError(
                f"{bin_path(dataset.prefix)}: has the token id {part[wrong[0]]} "
                f"{_place(dataset, first + int(wrong[0]))}, "
                f"expected 0 to {vocab_size - 1} with model.vocab_size {vocab_size}"
            )
    raise DataError(f"{bin_path(dataset.prefix)}: was changed while it was read")


def _place(dataset: IndexedDataset, token: int) -> str:
    ends = np.cumsum(dataset.sizes, dtype=np.int64)
    document = int(np.searchsorted(ends, token, side="right"))
    position = token - int(ends[document] - dataset.sizes[document])
    byte = token * dataset.dtype.itemsize
    return f"at byte {byte} (document {document}, token {position} of it, counted from 0)"


def _stamps(prefix: str | Path) -> tuple[Stamp, Stamp]:
    try:
        return stamp(bin_path(prefix)), stamp(idx_path(prefix))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _read(dataset: IndexedDataset, folder: Path | None) -> Content:
    stamps = _stamps(dataset.prefix)
    _, *times, _ = stamps[0]
    at_rest = time.time_ns() - max(times) > _REST_SECONDS * 1e9
    key = cache_key(dtype=dataset.dtype.str, stamp=stamps[0])
    arrays = ArrayCache().get(
        folder if at_rest else None,
        f"{dataset.prefix.name}-{key}-content",
        _SPECS,
        lambda: _as_arrays(*read_content(dataset)),
    )
    if _stamps(dataset.prefix) != stamps:
        raise DataError(f"{bin_path(dataset.prefix)}: was changed while it was read")
    smallest, largest = arrays["range"].tolist()
    content: NDArray[Any] = arrays["hash"]
    return Content(stamps, dataset.fingerprint, content.tobytes().hex(), smallest, largest)


def _as_arrays(content: str, smallest: int, largest: int) -> Arrays:
    found = np.frombuffer(bytes.fromhex(content), np.uint8)
    return {"hash": found, "range": np.array([smallest, largest], np.int64)}
