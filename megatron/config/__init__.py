"""The configuration of a run: one dataclass for each concern, under one root.

A run reads YAML files and then the overrides of its command line, the later winning:

    bloom train --config bloom-560m --optimizer.lr 1e-4 --parallel.tensor 2

Unknown names and values of a wrong type are errors. A config is read, never written: what follows
from other values is a property. What can be checked without knowing the machine is checked when the
object is made; what depends on the number of ranks, by ``Config.layout``.
"""

from megatron.config.data import DataConfig
from megatron.config.deepspeed import deepspeed_values, nvme_options
from megatron.config.engine import EngineConfig
from megatron.config.model import (
    BACKENDS_WITH_DROPOUT,
    Activation,
    AlibiPrecision,
    AttentionBackend,
    Backend,
    ModelConfig,
    PositionEmbedding,
)
from megatron.config.named import config_names, config_path
from megatron.config.parallel import ParallelConfig, ScheduleName
from megatron.config.parser import asks_for_help
from megatron.config.root import Config, config_from_dict, config_to_dict, load_config
from megatron.config.run import CheckpointConfig, LaunchConfig, LogConfig
from megatron.config.training import (
    LossScaleConfig,
    OptimizerConfig,
    RampupConfig,
    Recompute,
    TrainConfig,
    dtype_named,
)

__all__ = [
    "Activation",
    "AlibiPrecision",
    "AttentionBackend",
    "BACKENDS_WITH_DROPOUT",
    "Backend",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "LaunchConfig",
    "LogConfig",
    "LossScaleConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PositionEmbedding",
    "RampupConfig",
    "Recompute",
    "ScheduleName",
    "TrainConfig",
    "asks_for_help",
    "config_from_dict",
    "config_names",
    "config_path",
    "config_to_dict",
    "deepspeed_values",
    "dtype_named",
    "load_config",
    "nvme_options",
]
