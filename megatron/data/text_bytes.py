"""How much text is behind the tokens of a sample, to give losses per byte of text.

PREFIX.bytes has the length of the text of each document in UTF-8 bytes, little-endian uint32, or
uint64 where a document has 4 GiB or more. It is optional; its hash is in PREFIX.json.

A sample may hold a part of a document only, which then counts for its share of the tokens of that
document. Counted are the tokens that are predicted: all of a sample but the first.
"""

from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.atomic import atomic_write
from megatron.data.description import description_path, read_description
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.samples import Samples
from megatron.errors import DataError
from megatron.hashing import hash_file
from megatron.plain import PlainDataError, read_file


def text_bytes_path(prefix: str | Path) -> Path:
    """The file of the lengths of all texts."""
    return Path(f"{prefix}.bytes")


def write_text_bytes(prefix: str | Path, lengths: Iterable[int]) -> str:
    """Write PREFIX.bytes, with one of ``lengths`` for each document; its hash.

    Raises:
        DiskError: if it cannot be written.
    """
    numbers = np.frombuffer(array("Q", lengths), np.uint64)
    wide = len(numbers) > 0 and numbers.max() > np.iinfo(np.uint32).max
    path = text_bytes_path(prefix)
    with atomic_write(path) as file:
        file.write(numbers.astype("<u8" if wide else "<u4").tobytes())
    return hash_file(path)


def bytes_per_token(samples: Samples, num_samples: int) -> float | None:
    """Bytes of text behind one predicted token of the first ``num_samples`` samples, on average.

    None if the lengths of the texts of a dataset in them are not known.

    Raises:
        DataError: if what says so is damaged.
    """
    lengths: dict[Path, NDArray[Any] | None] = {}
    tokens, num_bytes = 0, 0.0
    for index in range(num_samples):
        first = 1
        for dataset, document, _, length in samples.pieces(index):
            if length == 0:
                continue
            prefix = dataset.prefix
            if prefix not in lengths:
                lengths[prefix] = read_text_bytes(dataset)
            of_document = lengths[prefix]
            if of_document is None:
                return None
            predicted = length - first
            first = 0
            tokens += predicted
            num_bytes += predicted * int(of_document[document]) / int(dataset.sizes[document])
    return num_bytes / tokens if num_bytes > 0 else None


def read_text_bytes(dataset: IndexedDataset) -> NDArray[Any] | None:
    """The length of the text of each document of ``dataset``; None if it is not known.

    Raises:
        DataError: if the file is not what PREFIX.json says.
    """
    description = read_description(dataset.prefix)
    if description is None or description.text_bytes is None:
        return None
    path = text_bytes_path(dataset.prefix)
    try:
        content = read_file(path)
        found = hash_file(path)
    except FileNotFoundError:
        return None
    except (OSError, PlainDataError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    width = len(content) // max(1, len(dataset))
    if found != description.text_bytes or width * len(dataset) != len(content):
        raise DataError(
            f"{path}: is not the file that {description_path(dataset.prefix).name} describes; "
            "remove it to go on without bits per byte"
        )
    return np.frombuffer(content, "<u8" if width == 8 else "<u4")
