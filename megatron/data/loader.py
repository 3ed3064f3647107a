"""From the configuration to the microbatches of one data rank.

    config.data.paths  --IndexedDataset-->  documents of one split  --GPTSamples-->  samples
    samples of all paths  --BlendedSamples-->  samples  --MicrobatchLoader-->  microbatches

Whatever can be wrong with the data is found while the samples are built, before the first step.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch

from megatron.config import Config
from megatron.data.blend import (
    BlendedSamples,
    samples_of_each,
    split_documents,
    taken_of_each,
)
from megatron.data.cache import ArraySpec, cache_key, cached_arrays
from megatron.data.description import Description, description_path, read_description
from megatron.data.history import Phase, continued_samples
from megatron.data.indexed_dataset import IndexedDataset, bin_path
from megatron.data.sampler import microbatch_samples
from megatron.data.samples import GPTSamples, Samples
from megatron.errors import DataError
from megatron.tokenizer import load_tokenizer

Split: TypeAlias = Literal["train", "valid", "test"]
Microbatch: TypeAlias = dict[str, torch.Tensor]

SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def build_samples(
    config: Config, split: Split, num_samples: int, phases: Sequence[Phase] = ()
) -> Samples:
    """The samples of one split of all data, at least ``num_samples``, in the order of training.

    Every rank calls it and gets the same; orders are kept in config.data.cache_folder.

    Args:
        phases: those of a run that has gone on otherwise than it began, the last one that of
            ``num_samples``; none is a run that reads as its config says, from the first sample on.

    Raises:
        DataError: if data is missing, damaged, too small for the split, or not of the model's
            vocabulary or of config.data.tokenizer.
    """
    paths = config.data.paths
    if not paths:
        raise DataError("data.paths is empty: name the prefix of at least one dataset")
    tokenizer = None
    if config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer).fingerprint
    phases = phases or [Phase(0, config.model.seq_length, num_samples)]
    if len(paths) == 1:
        return _build_dataset(config, next(iter(paths)), split, phases, tokenizer)
    total = sum(paths.values())
    weights = [weight / total for weight in paths.values()]
    datasets = [
        _build_dataset(config, path, split, own, tokenizer)
        for path, own in zip(paths, phases_of_each(phases, weights), strict=True)
    ]
    return BlendedSamples(datasets, weights, max(phase.num_samples for phase in phases))


def phases_of_each(phases: Sequence[Phase], weights: Sequence[float]) -> Iterator[list[Phase]]:
    """For each dataset of a blend, what the phases of the run are of its own samples."""
    needs = [samples_of_each(weights, phase.num_samples) for phase in phases]
    firsts = [taken_of_each(weights, phase.first) for phase in phases]
    for dataset in range(len(weights)):
        yield [
            Phase(first[dataset], phase.seq_length, needed[dataset])
            for first, phase, needed in zip(firsts, phases, needs, strict=True)
        ]


def _build_dataset(
    config: Config, prefix: str, split: Split, phases: Sequence[Phase], tokenizer: str | None
) -> Samples:
    """The samples of one path; ``tokenizer`` is the fingerprint of config.data.tokenizer."""
    dataset = IndexedDataset(prefix)
    folder = config.data.cache_folder or dataset.prefix.parent
    description = read_description(prefix)
    if description is not None:
        _check_description(config, dataset, description, tokenizer)
    _check_vocabulary(config.model.vocab_size, dataset, description, folder)
    documents = split_documents(len(dataset), config.data.split)[SPLITS.index(split)]
    if len(documents) == 0:
        raise DataError(
            f"{prefix}: data.split {list(config.data.split)} leaves none of its {len(dataset)} "
            f"documents for {split}"
        )

    def new_order(num_samples: int, seq_length: int, seed: int) -> GPTSamples:
        return GPTSamples(dataset, num_samples, seq_length, seed, documents, folder)

    return continued_samples(phases, config.train.seed, new_order)


def _check_description(
    config: Config, dataset: IndexedDataset, description: Description, tokenizer: str | None
) -> None:
    """Refuse a description of other data, and data of another tokenizer."""
    path = description_path(dataset.prefix)
    if description.dataset != dataset.fingerprint:
        raise DataError(
            f"{path}: describes the dataset {description.dataset}, "
            f"but the files beside it are {dataset.fingerprint}"
        )
    if tokenizer is not None and description.tokenizer != tokenizer:
        raise DataError(
            f"{path}: the data was made with tokenizer {description.tokenizer}, "
            f"but data.tokenizer {config.data.tokenizer} is {tokenizer}"
        )


def _check_vocabulary(
    vocab_size: int, dataset: IndexedDataset, description: Description | None, folder: Path
) -> None:
    """Refuse tokens that the model has no embedding for."""
    if description is not None:
        smallest, largest = 0, description.largest_token
    else:
        smallest, largest = _token_range(dataset, folder)
    if smallest < 0 or largest >= vocab_size:
        wrong = smallest if smallest < 0 else largest
        raise DataError(
            f"{bin_path(dataset.prefix)}: has the token id {wrong}, "
            f"expected 0 to {vocab_size - 1} with model.vocab_size {vocab_size}"
        )


def _token_range(dataset: IndexedDataset, folder: Path) -> tuple[int, int]:
    # The fingerprint does not depend on the tokens themselves, so the time of the file must help.
    modified = bin_path(dataset.prefix).stat().st_mtime_ns
    key = cache_key(dataset=dataset.fingerprint, modified=modified)
    arrays = cached_arrays(
        folder,
        f"{dataset.prefix.name}-{key}",
        {"token_range": ArraySpec((2,), np.dtype(np.int64))},
        lambda: {"token_range": np.array(dataset.token_range(), np.int64)},
    )
    smallest, largest = arrays["token_range"].tolist()
    return smallest, largest


class MicrobatchLoader:
    """Reads the microbatches of data rank ``rank`` of ``size``; holds no position.

    The rank is the data rank: ranks that share one model read the same microbatches.
    """

    def __init__(self, samples: Samples, rank: int, size: int) -> None:
        self._samples = samples
        self._rank = rank
        self._size = size

    def read(
        self, consumed_samples: int, global_batch: int, micro_batch: int
    ) -> Iterator[Microbatch]:
        """The microbatches of the step that begins after ``consumed_samples``.

        Each has "tokens", int64 ``(micro_batch, seq_length + 1)``, and "samples", the numbers of
        the samples in the whole run, int64 ``(micro_batch,)``.

        Raises:
            ValueError: if the batch cannot be shared evenly, or goes beyond the last sample.
        """
        if consumed_samples + global_batch > len(self._samples):
            raise ValueError(
                f"a batch of {global_batch} after {consumed_samples} samples goes beyond the "
                f"{len(self._samples)} samples that were built"
            )
        numbers = microbatch_samples(
            consumed_samples, global_batch, micro_batch, self._rank, self._size
        )
        return map(self._collate, numbers)

    def _collate(self, numbers: Sequence[int]) -> Microbatch:
        tokens = np.stack([self._samples[number] for number in numbers])
        return {"tokens": torch.from_numpy(tokens), "samples": torch.tensor(numbers)}
