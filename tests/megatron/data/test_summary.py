"""How much data a run has and how often it reads it, against counts by hand."""

from pathlib import Path

import numpy as np
import pytest

from megatron.config import Config, DataConfig, ModelConfig, TrainConfig
from megatron.data.content import Findings
from megatron.data.indexed_dataset import IndexedDatasetWriter
from megatron.data.summary import DatasetSummary, summarize


def write(prefix: Path, sizes: list[int]) -> str:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for size in sizes:
            writer.add(np.ones(size, np.uint16))
            writer.end_document()
    return str(prefix)


def make_config(folder: Path, paths: dict[str, float], samples: int) -> Config:
    return Config(
        folder=folder / "run",
        model=ModelConfig(num_layers=1, hidden_size=8, num_heads=1, vocab_size=16, seq_length=10),
        train=TrainConfig(samples=samples, global_batch_size=1),
        data=DataConfig(paths=paths, split=(8, 2, 0)),
    )


def test_tokens_of_each_split_and_epochs_of_a_blend(tmp_path: Path) -> None:
    small = write(tmp_path / "small", [5, 10, 15, 20, 25, 30, 35, 40, 7, 8])
    large = write(tmp_path / "large", [100] * 10)
    config = make_config(tmp_path, {small: 3.0, large: 1.0}, samples=72)
    assert summarize(config, Findings()) == [
        DatasetSummary(small, 0.75, 180, 15, pytest.approx(0.75 * 720 / 180)),
        DatasetSummary(large, 0.25, 800, 200, pytest.approx(0.25 * 720 / 800)),
    ]
