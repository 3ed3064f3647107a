"""A config and a rank for the tests of this folder."""

from pathlib import Path
from typing import Any

import torch

from megatron.config import Config, DataConfig, LogConfig, ModelConfig, TrainConfig
from megatron.launch import Launch
from mpu import ParallelDims, build_groups

CPU = torch.device("cpu")
SEQ_LENGTH = 8


def make_config(
    folder: Path, *, train: dict[str, Any] | None = None, data: dict[str, Any] | None = None
) -> Config:
    """Eight steps of four samples, in ``folder / "run"``."""
    return Config(
        folder=folder / "run",
        model=ModelConfig(
            num_layers=1, hidden_size=16, num_heads=2, vocab_size=60000, seq_length=SEQ_LENGTH
        ),
        train=TrainConfig(
            **{"samples": 32, "global_batch_size": 4, "micro_batch_size": 2, **(train or {})}
        ),
        data=DataConfig(**(data or {})),
        log=LogConfig(interval=3),
    )


def make_launch(tensor: int = 1, data: int = 1) -> Launch:
    """This rank of a grid. Collective."""
    groups = build_groups(ParallelDims(tensor=tensor, data=data))
    return Launch(torch.distributed.get_rank(), tensor * data, CPU, groups)
