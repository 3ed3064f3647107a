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

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.data.cache import Arrays, ArraySpec, cache_key, cached_arrays
from megatron.data.indexed_dataset import IndexedDataset
from megatron.errors import DataError

# The last epoch stays apart if less than this share of its samples is needed.
WHOLE_EPOCH_SHARE = 0.95


class Samples(Protocol):
    """A fixed sequence of training samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """The tokens of one sample, int64 ``(seq_length + 1,)``."""


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


class GPTSamples:
    """The samples of one dataset, in shuffled order.

    ``len(samples)`` is at least ``num_samples``: all whole samples of as many epochs as those need.

    Args:
        dataset: where the tokens are.
        num_samples: samples that are needed.
        seq_length: a sample has one token more.
        seed: seed of the order, at least 0 and below 2**32.
        documents: sequences of the dataset to draw from; None is all.
        cache_folder: where to keep the order between runs; None keeps nothing.

    Raises:
        DataError: if the documents have too few tokens for one sample.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        num_samples: int,
        seq_length: int,
        seed: int,
        documents: range | None = None,
        cache_folder: Path | None = None,
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
        arrays = cached_arrays(
            cache_folder,
            f"{dataset.prefix.name}-{key}",
            order.specs(),
            lambda: order.build(documents, dataset.sizes),
        )
        self._dataset = dataset
        self.seq_length = seq_length
        self._document_index = arrays["document_index"]
        self._sample_index = arrays["sample_index"]
        self.shuffle_index = arrays["shuffle_index"]

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        sample = int(self.shuffle_index[range(len(self))[index]])
        return self.tokens(sample * self.seq_length, self.seq_length + 1)

    def tokens(self, start: int, length: int) -> NDArray[np.int64]:
        """``length`` tokens of the documents laid end to end, from ``start`` on."""
        sample, skipped = divmod(start, self.seq_length)
        entry, offset = self._sample_index[sample].tolist()
        last = self._sample_index[-(-(start + length - 1) // self.seq_length), 0]
        offset += skipped
        tokens = np.empty(length, np.int64)
        filled = 0
        for document in self._document_index[entry : last + 1].tolist():
            part = self._dataset.get(document, offset, length - filled)
            tokens[filled : filled + len(part)] = part
            filled += len(part)
            offset = max(0, offset - int(self._dataset.sizes[document]))
        return tokens
