"""How much data a run has, and how often it reads it."""

from dataclasses import dataclass

import numpy as np

from megatron.config import Config
from megatron.data.blend import split_documents
from megatron.data.content import Findings
from megatron.data.loader import cache_folder


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
