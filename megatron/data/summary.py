"""How much data a run has, and how often it reads it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.config import Config
from megatron.data.blend import split_documents
from megatron.data.content import Findings
from megatron.data.loader import cache_folder

_ABOUT = 8
"""Datasets that are told of one by one."""


@dataclass(frozen=True)
class DatasetSummary:
    """One dataset of a run.

    Attributes:
        prefix: of its files.
        share: of the samples of the run.
        train_tokens, valid_tokens: in the documents of these splits.
        epochs: how often the run reads the tokens that it trains on, from its start to its end.
    """

    prefix: str
    share: float
    train_tokens: int
    valid_tokens: int
    epochs: float


def summarize(config: Config, findings: Findings) -> list[DatasetSummary]:
    """What ``config`` reads of each dataset.

    Raises:
        DataError: if the files cannot be read.
    """
    total = sum(config.data.paths.values())
    needed = config.train.samples * config.model.seq_length
    summaries = []
    for prefix, weight in config.data.paths.items():
        dataset, _ = findings.open(prefix, cache_folder(config, prefix))
        train, valid, _ = (
            int(dataset.sizes[documents.start : documents.stop].sum(dtype=np.int64))
            for documents in split_documents(len(dataset), config.data.split)
        )
        share = weight / total
        epochs = share * needed / train if train else 0.0
        summaries.append(DatasetSummary(prefix, share, train, valid, epochs))
    return summaries


def summary_lines(summaries: Sequence[DatasetSummary]) -> Iterator[str]:
    """For people: all data, and what is read of each dataset, the most often read first."""
    if not summaries:
        return
    train = sum(it.train_tokens for it in summaries)
    valid = sum(it.valid_tokens for it in summaries)
    yield f"data: {_count(train)} tokens to train on, {_count(valid)} tokens to validate with"
    if len(summaries) == 1:
        yield f"data: the run reads {summaries[0].epochs:.3g} epochs of {summaries[0].prefix}"
        return
    ordered = sorted(summaries, key=lambda it: it.epochs, reverse=True)
    for it in ordered[:_ABOUT]:
        yield (
            f"data: {it.share:.1%} from {it.prefix}, {it.epochs:.3g} epochs of "
            f"{_count(it.train_tokens)} tokens"
        )
    if len(ordered) > _ABOUT:
        rest = ordered[_ABOUT:]
        share = sum(it.share for it in rest)
        yield f"data: {share:.1%} from {len(rest)} more, at most {rest[0].epochs:.3g} epochs each"


def _count(number: int) -> str:
    """As in 4.03 M."""
    for unit, name in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)
