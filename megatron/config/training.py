"""What is trained, how long, and by which optimizer."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from megatron.config.rules import (
    require,
    require_below_one,
    require_multiple,
    require_not_negative,
    require_positive,
)

if TYPE_CHECKING:
    import torch

Recompute: TypeAlias = Literal["none", "selective", "full"]

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def dtype_named(name: str) -> "torch.dtype":
    """Torch's dtype for one of the words of ``train.dtype``."""
    # Torch takes seconds to import, and a config is read without it.
    import torch

    dtype: torch.dtype = getattr(torch, _DTYPES[name])
    return dtype


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule and the clipping of gradients."""

    name: Literal["adamw", "apex_adamw"] = "adamw"
    """AdamW in torch, or apex's fused one, which needs apex and a GPU."""
    lr: float = 3e-4
    """Learning rate at its highest, after the warm-up."""
    min_lr: float = 0.0
    """Learning rate that the decay ends at."""
    decay: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "cosine"
    """How the learning rate falls from lr to min_lr after the warm-up."""
    warmup_samples: int = 0
    """Samples over which the learning rate grows from 0 to lr."""
    decay_samples: int | None = None
    """Samples at which the learning rate has reached min_lr; null is train.samples."""
    weight_decay: float = 0.1
    """Decay of AdamW, decoupled from the gradient; biases and norms have none."""
    beta1: float = 0.9
    """Part of the mean of the gradients that stays at each step."""
    beta2: float = 0.95
    """Part of the mean of their squares that stays at each step."""
    eps: float = 1e-8
    """Added to the root of the mean of squares, which the update is divided by."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; 0 turns clipping off."""

    def __post_init__(self) -> None:
        require_positive("optimizer", lr=self.lr, eps=self.eps)
        require_not_negative(
            "optimizer",
            min_lr=self.min_lr,
            warmup_samples=self.warmup_samples,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )
        require_below_one("optimizer", beta1=self.beta1, beta2=self.beta2)
        require(
            self.min_lr <= self.lr,
            f"optimizer.min_lr ({self.min_lr}) must not be above optimizer.lr ({self.lr})",
        )
        if self.decay_samples is not None:
            require(
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
    """Samples by which the batch grows at a time."""
    samples: int = 0
    """Samples over which the batch grows."""

    def __post_init__(self) -> None:
        values = (self.start, self.increment, self.samples)
        require(
            min(values) > 0 or values == (0, 0, 0),
            "train.rampup.start, train.rampup.increment and train.rampup.samples must be above 0, "
            "or all 0 for no ramp-up, got {}, {} and {}".format(*values),
        )


@dataclass(frozen=True, kw_only=True)
class LossScaleConfig:
    """What the loss is multiplied by under fp16, so that small gradients are not lost.

    It doubles after ``window`` steps in a row without overflow, and halves at the ``hysteresis``-th
    overflow since it has last doubled, and at each after that.
    """

    initial: float = 2.0**16
    """The scale at the start."""
    minimum: float = 1.0
    """An overflow at this scale ends the run."""
    window: int = 1000
    """Steps in a row without overflow after which the scale doubles."""
    hysteresis: int = 2
    """Overflows since the scale last doubled after which it halves."""

    def __post_init__(self) -> None:
        require_positive("train.loss_scale", **vars(self))
        require(
            self.minimum <= self.initial,
            f"train.loss_scale.minimum ({self.minimum}) must not be above "
            f"train.loss_scale.initial ({self.initial})",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batches, precision and evaluation of the run."""

    samples: int
    """Samples to train on in all; a last batch that would go beyond is left out."""
    global_batch_size: int
    """Samples in one step, over all ranks."""
    micro_batch_size: int | Literal["auto"] = 1
    """Samples in one forward pass of one rank; auto takes the fastest size that memory allows."""
    rampup: RampupConfig = field(default_factory=RampupConfig)
    seed: int = 1234
    """Of the weights, the order of the samples and dropout; below 2**32."""
    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Precision of the computation; weights and gradients are kept in fp32 under bf16 and fp16."""
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    fp8: bool = False
    """Multiply in 8-bit floating point in the layers' linear maps; needs bf16 and torchao."""
    recompute: Recompute = "none"
    """Activations to compute again in the backward pass: of attention (selective) or all (full)."""
    eval_interval: int = 0
    """Steps between evaluations; 0 evaluates never."""
    eval_samples: int = 0
    """Samples of one evaluation."""
    replica_check_interval: int = 100
    """Steps between comparisons of what ranks must hold alike; 0 compares before saves only."""
    stop_at_step: int | None = None
    """Save and leave after this step, before the run is complete."""

    def __post_init__(self) -> None:
        require_positive(
            "train",
            samples=self.samples,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.least_micro_batch_size,
        )
        require_not_negative(
            "train",
            eval_interval=self.eval_interval,
            eval_samples=self.eval_samples,
            replica_check_interval=self.replica_check_interval,
        )
        require(
            self.eval_interval == 0 or self.eval_samples > 0,
            f"train.eval_samples must be above 0 with train.eval_interval {self.eval_interval}, "
            f"got {self.eval_samples}",
        )
        require(
            0 <= self.seed < 2**32,
            f"train.seed must be at least 0 and below 2**32, got {self.seed}",
        )
        require(
            not self.fp8 or self.dtype == "bf16",
            f"train.fp8 needs train.dtype bf16, got {self.dtype}",
        )
        if self.stop_at_step is not None:
            require_positive("train", stop_at_step=self.stop_at_step)
        if self.rampup.start > 0:
            self._check_rampup(self.rampup)
        first = next(self.batch_sizes())
        require(
            self.samples >= first,
            f"train.samples ({self.samples}) must not be below the first batch ({first})",
        )

    def _check_rampup(self, rampup: RampupConfig) -> None:
        growth = self.global_batch_size - rampup.start
        require(
            growth >= 0,
            f"train.rampup.start ({rampup.start}) must not be above train.global_batch_size "
            f"({self.global_batch_size})",
        )
        require_multiple(
            "train.global_batch_size - train.rampup.start",
            growth,
            "train.rampup.increment",
            rampup.increment,
        )

    @property
    def torch_dtype(self) -> "torch.dtype":
        return dtype_named(self.dtype)

    @property
    def least_micro_batch_size(self) -> int:
        """The micro-batch size, or the least that auto may come to."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size

    def batch_sizes(self) -> Iterator[int]:
        """Every global batch size of the run, in order."""
        if self.rampup.start == 0:
            yield self.global_batch_size
        else:
            yield from range(self.rampup.start, self.global_batch_size + 1, self.rampup.increment)
