"""From the configuration to the microbatches of one data rank.

    config.data.paths  --IndexedDataset-->  documents of one split  --GPTSamples-->  samples
    samples of all paths  --BlendedSamples-->  samples  --MicrobatchLoader-->  microbatches

Whatever can be wrong with the data is found while the samples are built, before the first step.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch

from megatron.config import Config
from megatron.data.blend import BlendedSamples, samples_of_each, split_documents, taken_of_each
from megatron.data.cache import ArrayCache
from megatron.data.content import Content, Findings, check_tokens
from megatron.data.description import Description, description_path, read_description
from megatron.data.history import Phase, SamplesFrom, continued_samples
from megatron.data.indexed_dataset import IndexedDataset, bin_path
from megatron.data.sampler import microbatch_samples
from megatron.data.samples import GPTSamples, Samples
from megatron.errors import DataError
from megatron.tokenizer import load_tokenizer

Split: TypeAlias = Literal["train", "valid", "test"]
Microbatch: TypeAlias = dict[str, torch.Tensor]

SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def build_samples(
    config: Config,
    split: Split,
    num_samples: int | Sequence[Phase],
    findings: Findings | None = None,
) -> Samples:
    """The samples of one split of all data, at least ``num_samples``, in the order of training.

    Every rank calls it and gets the same; orders are kept in config.data.cache_folder.

    Args:
        num_samples: or, for a run that has gone on otherwise than it began, its phases.
        findings: what is known of the data, to which is added what is found out here.

    Raises:
        DataError: if data is missing, damaged, too small for the split, or not of the model's
            vocabulary or of config.data.tokenizer.
    """
    paths = config.data.paths
    findings = findings or Findings()
    _check_paths(config)
    tokenizer = None
    if config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer).fingerprint
    if isinstance(num_samples, int):
        num_samples = [Phase(0, config.model.seq_length, num_samples)]
    # Samples before the first phase came from other data.
    first = num_samples[0].first
    phases = [
        Phase(phase.first - first, phase.seq_length, phase.num_samples - first)
        for phase in num_samples
    ]
    total = sum(paths.values())
    weights = [weight / total for weight in paths.values()]
    folder = cache_folder(config, next(iter(paths)))
    of_each = phases_of_each(phases, weights, findings.cache, folder)
    datasets = [
        _build_dataset(config, path, split, own, tokenizer, findings)
        for path, own in zip(paths, of_each, strict=True)
    ]
    samples = datasets[0]
    if len(datasets) > 1:
        most = max(phase.num_samples for phase in phases)
        samples = BlendedSamples(datasets, weights, most, findings.cache, folder)
    return samples if first == 0 else SamplesFrom(first, samples)


def phases_of_each(
    phases: Sequence[Phase],
    weights: Sequence[float],
    cache: ArrayCache | None = None,
    folder: Path | None = None,
) -> Iterator[Sequence[Phase]]:
    """For each dataset of a blend, what the phases of the run are of its own samples."""
    if len(weights) == 1:
        yield phases
        return
    needs = [samples_of_each(weights, phase.num_samples) for phase in phases]
    firsts = [taken_of_each(weights, phase.first, cache, folder) for phase in phases]
    for dataset in range(len(weights)):
        yield [
            Phase(first[dataset], phase.seq_length, needed[dataset])
            for first, phase, needed in zip(firsts, phases, needs, strict=True)
        ]


def read_contents(config: Config, prefixes: Iterable[str], findings: Findings) -> None:
    """Read the tokens of the datasets ``prefixes``, unless it is known what they are.

    Raises:
        DataError: if files cannot be read, or are not what the format asks for.
    """
    for prefix in prefixes:
        findings.open(prefix, cache_folder(config, prefix))


def cache_folder(config: Config, prefix: str) -> Path:
    """Where to keep what was found out about the dataset ``prefix``."""
    return config.data.cache_folder or Path(prefix).parent


def _check_paths(config: Config) -> None:
    if not config.data.paths:
        raise DataError("data.paths is empty: name the prefix of at least one dataset")


def _build_dataset(
    config: Config,
    prefix: str,
    split: Split,
    phases: Sequence[Phase],
    tokenizer: str | None,
    findings: Findings,
) -> Samples:
    """The samples of one path; ``tokenizer`` is the fingerprint of config.data.tokenizer."""
    folder = cache_folder(config, prefix)
    dataset, content = findings.open(prefix, folder)
    description = read_description(prefix)
    if description is not None:
        _check_description(config, dataset, content, description, tokenizer)
    check_tokens(dataset, content, config.model.vocab_size)
    documents = split_documents(len(dataset), config.data.split)[SPLITS.index(split)]
    if len(documents) == 0:
        raise DataError(
            f"{prefix}: data.split {list(config.data.split)} leaves none of its {len(dataset)} "
            f"documents for {split}"
        )

    def new_order(num_samples: int, seq_length: int, seed: int) -> GPTSamples:
        return GPTSamples(dataset, num_samples, seq_length, seed, documents, folder, findings.cache)

    return continued_samples(phases, config.train.seed, new_order)


def _check_description(
    config: Config,
    dataset: IndexedDataset,
    content: Content,
    description: Description,
    tokenizer: str | None,
) -> None:
    """Refuse a description of other data, and data of another tokenizer."""
    path = description_path(dataset.prefix)
    if description.dataset != content.fingerprint:
        raise DataError(
            f"{path}: describes the dataset {description.dataset}, "
            f"but the files beside it are {content.fingerprint}"
        )
    if description.content not in (None, content.hash):
        raise DataError(
            f"{path}: describes tokens of the hash {description.content}, "
            f"but {bin_path(dataset.prefix).name} has {content.hash}: it was changed since"
        )
    if tokenizer is not None and description.tokenizer != tokenizer:
        raise DataError(
            f"{path}: the data was made with tokenizer {description.tokenizer}, "
            f"but data.tokenizer {config.data.tokenizer} is {tokenizer}"
        )


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
