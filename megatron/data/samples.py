"""GPT samples: documents shuffled, laid end to end, and cut into equal pieces.

A document here is one sequence of an IndexedDataset. The documents, repeated for as many epochs as
the samples need, are shuffled and laid end to end. Sample k begins at token k * seq_length and has
seq_length + 1 tokens, so that its last token, which is only predicted, is the first of the next:

    documents   | 7 7 7 7 7 | 2 2 | 9 9 9 9 9 9 9 | 4 4 ...
    samples     [----- 0 -----]                          seq_length 6
                            [----- 1 -----]
                                        [----- 2 ---

At last the samples are shuffled as well. Three arrays say all of it:

    document_index    documents in shuffled order, int32 (epochs * documents,)
    sample_index      where sample k begins: entry of document_index, and token in that document,
                      int32 (samples + 1, 2)
    shuffle_index     which sample is the i-th to be read, uint32 (samples,)

If only a part of the last epoch is needed, its documents and samples stay behind those of the
epochs before it. The order is Megatron's, number by number, for the same data, seed and sizes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.data.cache import ArrayCache, Arrays, ArraySpec, cache_key
from megatron.data.indexed_dataset import IndexedDataset
from megatron.errors import DataError

# The last epoch stays apart if less than this share of its samples is needed.
WHOLE_EPOCH_SHARE = 0.95


class Piece(NamedTuple):
    """Neighbouring tokens of one document."""

    dataset: IndexedDataset
    document: int
    offset: int
    length: int

    def tokens(self) -> NDArray[np.integer[Any]]:
        """The tokens, 1-d; fewer than ``length`` if the document has no more."""
        return self.dataset.get(self.document, self.offset, self.length)


class Samples(Protocol):
    """A fixed sequence of training samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """The tokens of one sample, int64 ``(seq_length + 1,)``."""

    def pieces(self, index: int) -> Iterator[Piece]:
        """Where the tokens of a sample come from, in order."""


class StreamSamples(ABC):
    """Samples that are cut one after another out of a stream of tokens, and shuffled.

    Attributes:
        prefix: of the dataset.
        seq_length: tokens between the beginnings of two samples.
        shuffle_index: which of the samples along the stream is the i-th to be read, ``(samples,)``.
    """

    prefix: Path
    seq_length: int
    shuffle_index: NDArray[np.integer[Any]]

    @abstractmethod
    def stretch(self, start: int, length: int) -> Iterator[Piece]:
        """Where ``length`` tokens of the stream come from, the first of which is ``start``."""

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def pieces(self, index: int) -> Iterator[Piece]:
        sample = int(self.shuffle_index[range(len(self))[index]])
        return self.stretch(sample * self.seq_length, self.seq_length + 1)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        tokens = np.empty(self.seq_length + 1, np.int64)
        filled = 0
        for piece in self.pieces(index):
            part = piece.tokens()
            tokens[filled : filled + len(part)] = part
            filled += len(part)
        if filled != len(tokens):
            raise DataError(
                f"{self.prefix}: sample {index} has {filled} tokens in its documents, "
                f"expected {len(tokens)}: its order is not that of this data"
            )
        return tokens


@dataclass(frozen=True)
class SampleOrder:
    """The numbers that the order of samples follows from.

    Attributes:
        documents: number of documents to draw from.
        tokens: tokens of these documents, at least ``seq_length + 1``.
        num_samples: samples that are needed; the order may hold more.
        seq_length: tokens between the beginnings of two samples.
        seed: seed of the shuffles.
    """

    documents: int
    tokens: int
    num_samples: int
    seq_length: int
    seed: int

    @property
    def epochs(self) -> int:
        """The fewest passes over the documents that give the samples."""
        return max(1, -(-(self.num_samples * self.seq_length + 1) // self.tokens))

    def samples_of(self, epochs: int) -> int:
        """Number of whole samples in ``epochs`` passes."""
        return (epochs * self.tokens - 1) // self.seq_length

    @property
    def samples(self) -> int:
        """Number of samples in the order."""
        return self.samples_of(self.epochs)

    @property
    def samples_apart(self) -> int:
        """Number of samples, at the end, that are shuffled by themselves."""
        before = self.samples_of(self.epochs - 1)
        needed = self.num_samples - before
        if self.epochs > 1 and needed < int(WHOLE_EPOCH_SHARE * self.samples_of(1)):
            return self.samples - before
        return 0

    def specs(self) -> dict[str, ArraySpec]:
        """Shape and dtype of the three arrays."""
        entries = self.epochs * self.documents
        wide = self.samples >= np.iinfo(np.uint32).max
        return {
            "document_index": ArraySpec((entries,), np.dtype(np.int32)),
            "sample_index": ArraySpec((self.samples + 1, 2), np.dtype(np.int32)),
            "shuffle_index": ArraySpec((self.samples,), np.dtype(np.int64 if wide else np.uint32)),
        }

    def build(self, documents: range, sizes: NDArray[np.int32]) -> Arrays:
        """The three arrays, for ``documents`` out of those of ``sizes`` tokens."""
        random = np.random.RandomState(self.seed)
        apart = self.samples_apart
        document_index = _shuffle_documents(documents, self.epochs, apart > 0, random)
        sample_index = _cut_samples(sizes[document_index], self.samples, self.seq_length)
        dtype = self.specs()["shuffle_index"].dtype
        shuffle_index = np.arange(self.samples, dtype=dtype)
        random.shuffle(shuffle_index[: self.samples - apart])
        if apart > 0:
            random.shuffle(shuffle_index[-apart:])
        return {
            "document_index": document_index,
            "sample_index": sample_index,
            "shuffle_index": shuffle_index,
        }


def _shuffle_documents(
    documents: range, epochs: int, last_apart: bool, random: np.random.RandomState
) -> NDArray[np.int32]:
    """``epochs`` times the documents, shuffled; the last epoch by itself if ``last_apart``."""
    once = np.arange(documents.start, documents.stop, dtype=np.int32)
    index = np.tile(once, epochs)
    together = len(index) - len(once) if last_apart else len(index)
    random.shuffle(index[:together])
    if last_apart:
        random.shuffle(index[together:])
    return index


def _cut_samples(sizes: NDArray[np.int32], num_samples: int, seq_length: int) -> NDArray[np.int32]:
    """Where each sample begins, and the last one ends, in documents of ``sizes`` end to end."""
    ends = np.cumsum(sizes, dtype=np.int64)
    tokens = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    entries = np.searchsorted(ends, tokens, side="right")
    # The first sample begins at the first document, even if that is empty.
    entries[0] = 0
    index = np.empty((num_samples + 1, 2), np.int32)
    index[:, 0] = entries
    index[:, 1] = tokens - (ends[entries] - sizes[entries])
    return index


class GPTSamples(StreamSamples):
    """The samples of one dataset, in shuffled order.

    ``len(samples)`` is at least ``num_samples``: all whole samples of as many epochs as those need.

    Args:
        dataset: where the tokens are.
        num_samples: samples that are needed.
        seq_length: a sample has one token more.
        seed: seed of the order, at least 0 and below 2**32.
        documents: sequences of the dataset to draw from; None is all.
        cache_folder: where to keep the order between runs; None keeps nothing.
        cache: what is known of kept orders already.

    Raises:
        DataError: if the documents have too few tokens for one sample, or more than can be
            numbered.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        num_samples: int,
        seq_length: int,
        seed: int,
        documents: range | None = None,
        cache_folder: Path | None = None,
        cache: ArrayCache | None = None,
    ) -> None:
        documents = range(len(dataset)) if documents is None else documents
        tokens = int(dataset.sizes[documents.start : documents.stop].sum(dtype=np.int64))
        if tokens < seq_length + 1:
            raise DataError(
                f"{dataset.prefix}: the {len(documents)} documents from {documents.start} to "
                f"{documents.stop} have {tokens} tokens, but one sample has {seq_length + 1}"
            )
        order = SampleOrder(len(documents), tokens, num_samples, seq_length, seed)
        key = cache_key(
            dataset=dataset.fingerprint, first_document=documents.start, **asdict(order)
        )
        if order.epochs * len(documents) > np.iinfo(np.int32).max:
            raise DataError(
                f"{dataset.prefix}: {num_samples} samples take {order.epochs} epochs of "
                f"{len(documents)} documents, which are more than 2^31 - 1 in all"
            )
        arrays = (cache or ArrayCache()).get(
            cache_folder,
            f"{dataset.prefix.name}-{key}",
            order.specs(),
            lambda: order.build(documents, dataset.sizes),
        )
        self._dataset = dataset
        self.prefix = dataset.prefix
        self.seq_length = seq_length
        self._document_index = arrays["document_index"]
        self._sample_index = arrays["sample_index"]
        self.shuffle_index = arrays["shuffle_index"]

    def stretch(self, start: int, length: int) -> Iterator[Piece]:
        sample, skipped = divmod(start, self.seq_length)
        entry, offset = self._sample_index[sample].tolist()
        last = int(self._sample_index[-(-(start + length - 1) // self.seq_length), 0])
        offset += skipped
        for document in self._document_index[entry : last + 1].tolist():
            size = int(self._dataset.sizes[document])
            part = max(0, min(length, size - offset))
            yield Piece(self._dataset, document, min(offset, size), part)
            length -= part
            offset = max(0, offset - size)
