"""The configuration of a run: one dataclass for each concern, under one root.

A run reads YAML files and then the overrides of its command line, the later winning:

    pretrain_bloom.py --config examples/configs/tiny.yaml --optimizer.lr 1e-4 --parallel.tensor 2

Unknown names and values of a wrong type are errors. A config is read, never written: what follows
from other values is a property. What can be checked without knowing the machine is checked when the
object is made; what depends on the number of ranks, by ``Config.layout``.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from megatron.config_parser import config_from_values, parse_config
from megatron.errors import ConfigError
from mpu import ParallelDims

Activation: TypeAlias = Literal["gelu", "liglu", "geglu", "reglu", "swiglu"]
PositionEmbedding: TypeAlias = Literal["alibi", "rotary", "learned", "none"]
AlibiPrecision: TypeAlias = Literal["exact", "bloom_bf16"]
Backend: TypeAlias = Literal["explicit", "blocked", "sdpa", "flex", "flash"]
AttentionBackend: TypeAlias = Literal["auto", Backend]
Recompute: TypeAlias = Literal["none", "selective", "full"]

BACKENDS_WITH_DROPOUT: tuple[Backend, ...] = ("explicit", "blocked")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def _require(rule: bool, message: str) -> None:
    if not rule:
        raise ConfigError(message, on_every_rank=True)


def _require_positive(section: str, **values: float) -> None:
    for name, value in values.items():
        _require(
            0 < value < math.inf, f"{section}.{name} must be greater than 0 and finite, got {value}"
        )


def _require_not_negative(section: str, **values: float) -> None:
    for name, value in values.items():
        _require(value >= 0, f"{section}.{name} must not be negative, got {value}")


def _require_below_one(section: str, **values: float) -> None:
    for name, value in values.items():
        _require(0 <= value < 1, f"{section}.{name} must be at least 0 and below 1, got {value}")


def _require_multiple(name: str, value: int, of_name: str, of: int) -> None:
    below = value - value % of
    nearest = f"{below} or {below + of}" if below > 0 else str(of)
    _require(
        value % of == 0,
        f"{name} ({value}) must be a multiple of {of_name} ({of}), such as {nearest}",
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the model."""

    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    """Number of tokens that the tokenizer knows."""
    seq_length: int
    """Tokens in one training sample."""

    ffn_hidden_size: int | None = None
    """Width of the MLP; null is 4 * hidden_size."""
    vocab_padding_multiple: int = 128
    """Rows of the vocabulary on each tensor rank are padded to a multiple of this."""
    tie_embeddings: bool = True
    """Use the word embedding as output layer too."""
    embedding_layernorm: bool = True
    position_embedding: PositionEmbedding = "alibi"
    alibi_precision: AlibiPrecision = "exact"
    """bloom_bf16 rounds the bias as the published BLOOM models were trained."""
    num_token_types: int = 0
    """Size of the token-type embedding; 0 leaves it out."""
    pooler: bool = False
    """Add a pooled representation of the first token."""
    activation: Activation = "gelu"
    layernorm: Literal["torch", "apex"] = "torch"
    layernorm_epsilon: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float | None = None
    """Standard deviation of the initial weights; null is BLOOM's sqrt(1 / (3 hidden_size))."""
    attention_backend: AttentionBackend = "auto"
    """How attention is computed; auto takes blocked on CPUs, and on GPUs what is the fastest."""

    def __post_init__(self) -> None:
        _require_positive(
            "model",
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            vocab_size=self.vocab_size,
            seq_length=self.seq_length,
            ffn_hidden_size=self.ffn_size,
            vocab_padding_multiple=self.vocab_padding_multiple,
            layernorm_epsilon=self.layernorm_epsilon,
            init_std=self.initial_std,
        )
        _require_not_negative("model", num_token_types=self.num_token_types)
        _require_below_one(
            "model",
            hidden_dropout=self.hidden_dropout,
            attention_dropout=self.attention_dropout,
        )
        _require_multiple("model.hidden_size", self.hidden_size, "model.num_heads", self.num_heads)
        _require(
            self.position_embedding != "rotary" or self.head_size % 2 == 0,
            f"model.position_embedding rotary needs an even head size, got {self.head_size} "
            "(model.hidden_size / model.num_heads)",
        )
        self._check_backend()

    def _check_backend(self) -> None:
        backend = self.attention_backend
        _require(
            self.attention_dropout == 0 or backend in ("auto", *BACKENDS_WITH_DROPOUT),
            f"model.attention_backend {backend} needs model.attention_dropout 0, "
            f"got {self.attention_dropout}",
        )
        _require(
            backend != "flash" or not self.rounds_scores,
            "model.attention_backend flash needs model.alibi_precision exact, "
            f"got {self.alibi_precision}",
        )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def ffn_size(self) -> int:
        return 4 * self.hidden_size if self.ffn_hidden_size is None else self.ffn_hidden_size

    @property
    def rounds_scores(self) -> bool:
        """Attention scores are rounded with BLOOM's bias in them."""
        return self.position_embedding == "alibi" and self.alibi_precision == "bloom_bf16"

    @property
    def is_gated(self) -> bool:
        return self.activation != "gelu"

    @property
    def initial_std(self) -> float:
        return math.sqrt(1 / (3 * self.hidden_size)) if self.init_std is None else self.init_std


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the run is spread over ranks."""

    tensor: int = 1
    """Ranks that share each layer."""
    data: int | None = None
    """Ranks that read different samples; null is all that the tensor size leaves."""
    sequence: bool = False
    """Sequence parallelism: a tensor rank keeps a part of the sequence between parallel layers."""

    def __post_init__(self) -> None:
        _require_positive("parallel", tensor=self.tensor)
        if self.data is not None:
            _require_positive("parallel", data=self.data)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data and how it is cut into samples."""

    paths: dict[str, float] = field(default_factory=dict)
    """Prefixes of .bin/.idx files and their weights in the blend."""
    split: tuple[float, float, float] = (969, 30, 1)
    """Shares of the documents for training, validation and test."""
    tokenizer: Path | None = None
    """Tokenizer file or folder: gives the end-of-document token, and travels with checkpoints."""
    cache_folder: Path | None = None
    """Where sample orders are kept; null is the folder of the data."""
    reset_attention_mask: bool = False
    """Tokens do not see across the end of a document."""
    reset_position_ids: bool = False
    """Positions start again after the end of a document."""
    eod_mask_loss: bool = False
    """The end-of-document token, as an input, predicts nothing."""

    def __post_init__(self) -> None:
        for path, weight in self.paths.items():
            _require(weight > 0, f"data.paths {path}: the weight must be above 0, got {weight}")
        _require(
            min(self.split) >= 0 and self.split[0] > 0,
            f"data.split must be three shares, none negative and the first above 0, "
            f"got {list(self.split)}",
        )
        resets = self.reset_attention_mask or self.reset_position_ids or self.eod_mask_loss
        _require(
            not resets or self.tokenizer is not None,
            "data.tokenizer is needed by data.reset_attention_mask, data.reset_position_ids and "
            "data.eod_mask_loss, to know the end-of-document token; got null",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule and the clipping of gradients."""

    name: Literal["adamw", "apex_adamw"] = "adamw"
    lr: float = 3e-4
    min_lr: float = 0.0
    decay: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "cosine"
    warmup_samples: int = 0
    decay_samples: int | None = None
    """Samples at which the learning rate has reached min_lr; null is train.samples."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; 0 turns clipping off."""

    def __post_init__(self) -> None:
        _require_positive("optimizer", lr=self.lr, eps=self.eps)
        _require_not_negative(
            "optimizer",
            min_lr=self.min_lr,
            warmup_samples=self.warmup_samples,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )
        _require_below_one("optimizer", beta1=self.beta1, beta2=self.beta2)
        _require(
            self.min_lr <= self.lr,
            f"optimizer.min_lr ({self.min_lr}) must not be above optimizer.lr ({self.lr})",
        )
        if self.decay_samples is not None:
            _require(
                self.decay_samples >= max(1, self.warmup_samples),
                f"optimizer.decay_samples ({self.decay_samples}) must not be below "
                f"optimizer.warmup_samples ({self.warmup_samples})",
            )


@dataclass(frozen=True, kw_only=True)
class RampupConfig:
    """Growth of the global batch in equal steps from ``start`` to train.global_batch_size."""

    start: int = 0
    """Samples in the first step; 0 is no ramp-up."""
    increment: int = 0
    samples: int = 0
    """Samples over which the batch grows."""

    def __post_init__(self) -> None:
        values = (self.start, self.increment, self.samples)
        _require(
            min(values) > 0 or values == (0, 0, 0),
            "train.rampup.start, train.rampup.increment and train.rampup.samples must be above 0, "
            "or all 0 for no ramp-up, got {}, {} and {}".format(*values),
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batches, precision and evaluation of the run."""

    samples: int
    """Samples to train on in all; a last batch that would go beyond is left out."""
    global_batch_size: int
    """Samples in one step, over all ranks."""
    micro_batch_size: int = 1
    """Samples in one forward pass of one rank."""
    rampup: RampupConfig = field(default_factory=RampupConfig)
    seed: int = 1234
    """Of the weights, the order of the samples and dropout; below 2**32."""
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Precision of the computation; weights and gradients are kept in fp32 under bf16."""
    recompute: Recompute = "none"
    """Activations to compute again in the backward pass: of attention (selective) or all (full)."""
    eval_interval: int = 0
    """Steps between evaluations; 0 evaluates never."""
    eval_samples: int = 0
    """Samples of one evaluation."""
    stop_at_step: int | None = None
    """Save and leave after this step, before the run is complete."""

    def __post_init__(self) -> None:
        _require_positive(
            "train",
            samples=self.samples,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
        )
        _require_not_negative(
            "train", eval_interval=self.eval_interval, eval_samples=self.eval_samples
        )
        _require(
            self.eval_interval == 0 or self.eval_samples > 0,
            f"train.eval_samples must be above 0 with train.eval_interval {self.eval_interval}, "
            f"got {self.eval_samples}",
        )
        _require(
            0 <= self.seed < 2**32,
            f"train.seed must be at least 0 and below 2**32, got {self.seed}",
        )
        if self.stop_at_step is not None:
            _require_positive("train", stop_at_step=self.stop_at_step)
        if self.rampup.start > 0:
            self._check_rampup(self.rampup)
        first = next(self.batch_sizes())
        _require(
            self.samples >= first,
            f"train.samples ({self.samples}) must not be below the first batch ({first})",
        )

    def _check_rampup(self, rampup: RampupConfig) -> None:
        growth = self.global_batch_size - rampup.start
        _require(
            growth >= 0,
            f"train.rampup.start ({rampup.start}) must not be above train.global_batch_size "
            f"({self.global_batch_size})",
        )
        _require_multiple(
            "train.global_batch_size - train.rampup.start",
            growth,
            "train.rampup.increment",
            rampup.increment,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def batch_sizes(self) -> Iterator[int]:
        """Every global batch size of the run, in order."""
        if self.rampup.start == 0:
            yield self.global_batch_size
        else:
            yield from range(self.rampup.start, self.global_batch_size + 1, self.rampup.increment)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    save_interval: int = 0
    """Steps between saves; 0 saves at the end only."""
    keep_last: int = 2
    """Saves to keep; older ones are removed. 0 keeps all."""
    resume: Literal["auto", "required", "never"] = "auto"
    """Go on from the newest save of the run folder: if there is one, or an error without one."""

    def __post_init__(self) -> None:
        _require_not_negative(
            "checkpoint", save_interval=self.save_interval, keep_last=self.keep_last
        )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run tells of itself, besides metrics.jsonl."""

    interval: int = 10
    """Steps between log lines."""
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _require_positive("log", interval=self.interval)


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Device and patience."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs where they are."""
    startup_timeout: float = 300.0
    """Seconds to wait for the other ranks at the start."""
    timeout: float = 1800.0
    """Seconds to wait for another rank in one collective."""

    def __post_init__(self) -> None:
        _require_positive("launch", startup_timeout=self.startup_timeout, timeout=self.timeout)


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
        _require_multiple("model.num_heads", model.num_heads, *tensor)
        _require_multiple("model.ffn_hidden_size", model.ffn_size, *tensor)
        if self.parallel.sequence:
            _require_multiple("model.seq_length", model.seq_length, *tensor)
        backend, dtype = model.attention_backend, self.train.dtype
        _require(
            backend != "flash" or not self.data.reset_attention_mask,
            "model.attention_backend flash needs data.reset_attention_mask false, got true",
        )
        _require(
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
        _require(
            world_size % tensor == 0,
            f"parallel.tensor ({tensor}) must divide the number of ranks (WORLD_SIZE {world_size})",
        )
        data = world_size // tensor
        _require(
            self.parallel.data in (None, data),
            f"parallel.tensor ({tensor}) x parallel.data ({self.parallel.data}) must be the number "
            f"of ranks (WORLD_SIZE {world_size})",
        )
        step = self.train.micro_batch_size * data
        of = f"train.micro_batch_size {self.train.micro_batch_size} x data parallel size {data}"
        ramps_up = self.train.rampup.start > 0
        name = "every batch of train.rampup" if ramps_up else "train.global_batch_size"
        for batch in self.train.batch_sizes():
            _require_multiple(name, batch, of, step)
        _require_multiple("train.eval_samples", self.train.eval_samples, of, step)
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
