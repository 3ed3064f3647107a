"""The root of the config, and how it is read and written."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.data import DataConfig
from megatron.config.deepspeed import check_deepspeed
from megatron.config.engine import EngineConfig
from megatron.config.help import Guide
from megatron.config.model import ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.parser import config_from_values, parse_config
from megatron.config.rules import require, require_multiple
from megatron.config.run import CheckpointConfig, LaunchConfig, LogConfig
from megatron.config.training import OptimizerConfig, TrainConfig
from megatron.errors import ConfigError

if TYPE_CHECKING:
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
    engine: EngineConfig = field(default_factory=EngineConfig)
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
        require(
            model.num_layers >= self.parallel.num_stages,
            f"model.num_layers ({model.num_layers}) must not be below the number of stages, "
            f"parallel.pipeline ({self.parallel.pipeline}) x parallel.chunks "
            f"({self.parallel.chunks})",
        )
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
        if self.train.fp8:
            self._check_fp8()
        self._check_engine()

    def _check_fp8(self) -> None:
        """GPUs multiply fp8 in blocks of 16 along all but one dimension of a product."""
        block = ("train.fp8's 16 x parallel.tensor", 16 * self.parallel.tensor)
        require_multiple("model.hidden_size", self.model.hidden_size, *block)
        require_multiple("model.ffn_hidden_size", self.model.ffn_size, *block)
        tokens = self.train.least_micro_batch_size * self.model.seq_length
        name = "train.micro_batch_size x model.seq_length"
        require_multiple(name, tokens, "the block of train.fp8", 16)
        require(
            not self.parallel.symmetric_memory,
            "train.fp8 needs parallel.symmetric_memory false, got true: its operators are of bf16",
        )

    def _check_engine(self) -> None:
        engine = self.engine
        if engine.name == "deepspeed":
            check_deepspeed(engine, self.parallel, self.train, self.optimizer)
        require(
            engine.name == "deepspeed" or not engine.deepspeed,
            f"engine.deepspeed needs engine.name deepspeed, got {engine.name}",
        )

    def layout(self, world_size: int) -> "ParallelDims":
        """The rank grid on ``world_size`` ranks.

        Raises:
            ConfigError: if the config does not fit that number of ranks.
        """
        tensor, pipeline = self.parallel.tensor, self.parallel.pipeline
        model = tensor * pipeline
        name = f"parallel.tensor ({tensor})"
        if pipeline > 1:
            name += f" x parallel.pipeline ({pipeline})"
        require(
            world_size % model == 0,
            f"{name} must divide the number of ranks (WORLD_SIZE {world_size})",
        )
        data = world_size // model
        require(
            self.parallel.data in (None, data),
            f"{name} x parallel.data ({self.parallel.data}) must be the number "
            f"of ranks (WORLD_SIZE {world_size})",
        )
        step = self.train.least_micro_batch_size * data
        of = "the data parallel size"
        if self.train.micro_batch_size != "auto":
            of = f"train.micro_batch_size {self.train.micro_batch_size} x data parallel size {data}"
        ramps_up = self.train.rampup.start > 0
        name = "every batch of train.rampup" if ramps_up else "train.global_batch_size"
        for batch in self.train.batch_sizes():
            require_multiple(name, batch, of, step)
            self._check_microbatches(batch // step)
        require_multiple("train.eval_samples", self.train.eval_samples, of, step)
        # Torch comes with it, which takes seconds, and which help and messages do without.
        from mpu import ParallelDims

        return ParallelDims(tensor=tensor, data=data, pipeline=pipeline)

    def micro_batch_sizes(self, world_size: int) -> list[int]:
        """What auto may choose on ``world_size`` ranks, the smallest first.

        Of the sizes that ``layout`` takes, the powers of two and the largest.
        """
        shared = gcd(self.train.eval_samples, *self.train.batch_sizes())
        divisors = [size for size in range(1, shared + 1) if shared % size == 0]
        fitting = [size for size in divisors if self._takes(size, world_size)]
        return [size for size in fitting if size.bit_count() == 1 or size == fitting[-1]]

    def _takes(self, micro_batch_size: int, world_size: int) -> bool:
        """Whether ``layout`` would take that size."""
        try:
            train = replace(self.train, micro_batch_size=micro_batch_size)
            replace(self, train=train).layout(world_size)
        except ConfigError:
            return False
        return True

    def _check_microbatches(self, count: int) -> None:
        """Whether the pipeline can be filled with ``count`` microbatches on each data rank."""
        parallel = self.parallel
        require(
            count >= parallel.pipeline,
            f"parallel.pipeline ({parallel.pipeline}) must not be above the number of microbatches "
            f"of a data rank in one step ({count})",
        )
        if parallel.chunks > 1:
            require_multiple(
                "microbatches of a data rank in one step",
                count,
                f"parallel.pipeline with parallel.schedule {parallel.schedule}",
                parallel.pipeline,
            )


_GUIDE = Guide(
    prog="bloom train",
    description="Pretrain a BLOOM-style language model, or go on with the run in a folder.",
    examples=(
        "bloom train --config bloom-560m --data.paths.data/text 1.0 --data.tokenizer tok.json",
        "torchrun --nproc_per_node 4 --no_python bloom train --config run.yaml --parallel.tensor 2",
        "bloom train --config bloom-176b --dry_run 80",
    ),
    most_used=(
        "data.paths",
        "data.tokenizer",
        "train.micro_batch_size",
        "train.dtype",
        "train.stop_at_step",
        "optimizer.lr",
        "parallel.tensor",
        "checkpoint.save_interval",
        "checkpoint.resume",
        "log.interval",
    ),
    own={
        "dry_run [GIB]": "train nothing: count the memory of every stage, and whether GIB are "
        "enough for each rank; with --cluster a100, h100 or h200 also how long the run takes",
    },
)


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
    return parse_config(Config, argv, _GUIDE)
