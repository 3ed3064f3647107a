"""The root of the config, and how it is read and written."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.data import DataConfig
from megatron.config.model import ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.parser import config_from_values, parse_config
from megatron.config.rules import require, require_multiple
from megatron.config.run import CheckpointConfig, LaunchConfig, LogConfig
from megatron.config.training import OptimizerConfig, TrainConfig
from mpu import ParallelDims


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run depends on."""

    folder: Path
    """Where the run writes: metrics, checkpoints, its config."""
    model: ModelConfig
    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        model, tensor = self.model, ("parallel.tensor", self.parallel.tensor)
        require_multiple("model.num_heads", model.num_heads, *tensor)
        require_multiple("model.ffn_hidden_size", model.ffn_size, *tensor)
        if self.parallel.sequence:
            require_multiple("model.seq_length", model.seq_length, *tensor)
        backend, dtype = model.attention_backend, self.train.dtype
        require(
            backend != "flash" or not self.data.reset_attention_mask,
            "model.attention_backend flash needs data.reset_attention_mask false, got true",
        )
        require(
            (backend != "flash" or dtype == "bf16") and (backend != "flex" or dtype != "fp64"),
            f"model.attention_backend {backend} needs train.dtype bf16"
            f"{' or fp32' if backend == 'flex' else ''}, got {dtype}",
        )

    def layout(self, world_size: int) -> ParallelDims:
        """The rank grid on ``world_size`` ranks.

        Raises:
            ConfigError: if the config does not fit that number of ranks.
        """
        tensor = self.parallel.tensor
        require(
            world_size % tensor == 0,
            f"parallel.tensor ({tensor}) must divide the number of ranks (WORLD_SIZE {world_size})",
        )
        data = world_size // tensor
        require(
            self.parallel.data in (None, data),
            f"parallel.tensor ({tensor}) x parallel.data ({self.parallel.data}) must be the number "
            f"of ranks (WORLD_SIZE {world_size})",
        )
        step = self.train.micro_batch_size * data
        of = f"train.micro_batch_size {self.train.micro_batch_size} x data parallel size {data}"
        ramps_up = self.train.rampup.start > 0
        name = "every batch of train.rampup" if ramps_up else "train.global_batch_size"
        for batch in self.train.batch_sizes():
            require_multiple(name, batch, of, step)
        require_multiple("train.eval_samples", self.train.eval_samples, of, step)
        return ParallelDims(tensor=tensor, data=data)


def config_to_dict(config: Config) -> dict[str, Any]:
    """The values of ``config`` as JSON has them; what YAML prints of it can be read again."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return values


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The config that ``config_to_dict`` gave ``values`` for.

    Raises:
        ConfigError: naming the option, its value and the rule that it breaks.
    """
    return config_from_values(Config, values)


def load_config(argv: Sequence[str]) -> Config:
    """Make a config of the arguments ``argv``: ``--config FILE`` and ``--section.key value``.

    ``--help`` and ``--print_config`` print and raise SystemExit(0).

    Raises:
        ConfigError: naming the option, its value and the rule that it breaks.
    """
    description = "Pretrain a BLOOM-style language model."
    return parse_config(Config, argv, prog="pretrain_bloom.py", description=description)
