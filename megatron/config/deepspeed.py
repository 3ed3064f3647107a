"""What the options of a run are called in DeepSpeed's config.

One table for both directions: a run with engine deepspeed is configured by it, and what a user
hands to DeepSpeed besides may repeat these values, but not contradict them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import log2
from typing import Any

from megatron.config.deepspeed_options import rule_for
from megatron.config.dotted import flatten, nest
from megatron.config.engine import EngineConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.rules import require
from megatron.config.training import OptimizerConfig, TrainConfig

# Sections of DeepSpeed's config that do what a part of this project does, and which part that is.
_INSTEAD = {
    "activation_checkpointing": "train.recompute",
    "amp": "train.dtype",
    "checkpoint": "checkpoint",
    "curriculum_learning": "data",
    "data_efficiency": "data",
    "elasticity": "checkpoint",
    "optimizer": "optimizer",
    "pipeline.activation_checkpoint_interval": "train.recompute",
    "pipeline.partition": "parallel.partition",
    "pipeline.stages": "parallel.pipeline",
    "scheduler": "optimizer",
    "sequence_parallel_size": "parallel.sequence",
    "tensor_parallel": "parallel.tensor",
    "tensorboard": "log.tensorboard",
    "torch_autocast": "train.dtype",
}

_DEFAULTS = {
    # Gradients are added up in fp32, as by the other engine.
    "data_types.grad_accum_dtype": "fp32",
    # Offloading to a CPU works without a compiler, by torch's AdamW.
    "zero_force_ds_cpu_optimizer": False,
    # It would replace a function of torch in the whole process; our layers have their own.
    "zero_optimization.memory_efficient_linear": False,
    # Hidden states are sent whole: under sequence parallelism they differ in a tensor group.
    "pipeline.pipe_partitioned": False,
    "pipeline.grad_partitioned": False,
}


@dataclass(frozen=True)
class Owned:
    """A value in DeepSpeed's config that an option of this project decides."""

    option: str
    value: Any


def deepspeed_values(
    engine: EngineConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    optimizer: OptimizerConfig,
    data_size: int,
) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is given, on ``data_size`` data ranks.

    DeepSpeed is told of microbatches of one sample. It uses the size for counting only, and a run
    may look for the best one after its engine is there.
    """
    owned = {name: it.value for name, it in owned_values(parallel, train, optimizer).items()}
    count = max(1, train.global_batch_size // data_size)
    sizes = {
        "train_batch_size": count * data_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": count,
    }
    return nest(_DEFAULTS | dict(flatten(engine.deepspeed)) | owned | sizes)


def owned_values(
    parallel: ParallelConfig, train: TrainConfig, optimizer: OptimizerConfig
) -> dict[str, Owned]:
    """By dotted name, what options decide of DeepSpeed's config."""
    owned = {
        "train_batch_size": Owned("train.global_batch_size", train.global_batch_size),
        "train_micro_batch_size_per_gpu": Owned("train.micro_batch_size", train.micro_batch_size),
        "gradient_clipping": Owned("optimizer.max_grad_norm", optimizer.max_grad_norm),
        "zero_optimization.stage": Owned("parallel.zero", parallel.zero),
        "bf16.enabled": Owned("train.dtype bf16", train.dtype == "bf16"),
        "fp16.enabled": Owned("train.dtype fp16", train.dtype == "fp16"),
    }
    if train.dtype == "fp16":
        scale, section = train.loss_scale, "train.loss_scale"
        owned |= {
            # Zero stands for a scale that follows overflows.
            "fp16.loss_scale": Owned("the scale of train.dtype fp16", 0),
            "fp16.initial_scale_power": Owned(f"log2 of {section}.initial", log2(scale.initial)),
            "fp16.loss_scale_window": Owned(f"{section}.window", scale.window),
            "fp16.hysteresis": Owned(f"{section}.hysteresis", scale.hysteresis),
            "fp16.min_loss_scale": Owned(f"{section}.minimum", scale.minimum),
        }
    return owned


def check_deepspeed(
    engine: EngineConfig, parallel: ParallelConfig, train: TrainConfig, optimizer: OptimizerConfig
) -> None:
    """Refuse what DeepSpeed cannot do, and what it is told in contradiction to other options."""
    needs = "engine.name deepspeed needs"
    require(train.dtype != "fp64", f"{needs} train.dtype fp32, bf16 or fp16, got fp64")
    require(
        train.dtype == "fp32" or parallel.zero > 0,
        f"{needs} parallel.zero of at least 1 with train.dtype {train.dtype}, got 0: only then "
        "does it add gradients up in fp32",
    )
    require(
        parallel.pipeline == 1 or parallel.zero < 2,
        f"{needs} parallel.zero 0 or 1 with parallel.pipeline {parallel.pipeline}, "
        f"got {parallel.zero}",
    )
    require(parallel.schedule == "1f1b", f"{needs} parallel.schedule 1f1b, got {parallel.schedule}")
    require(
        train.dtype != "fp16" or log2(train.loss_scale.initial).is_integer(),
        f"{needs} a power of 2 as train.loss_scale.initial, got {train.loss_scale.initial}",
    )
    require(optimizer.name == "adamw", f"{needs} optimizer.name adamw, got {optimizer.name}")
    require(not train.fp8, f"{needs} train.fp8 false, got true")
    _check_extra(engine.deepspeed, owned_values(parallel, train, optimizer))


def nvme_options(engine: EngineConfig) -> list[str]:
    """The options that have something kept on a disk."""
    zero = engine.deepspeed.get("zero_optimization", {})
    return [
        f"engine.deepspeed.zero_optimization.{section}.device"
        for section in ("offload_optimizer", "offload_param")
        if zero.get(section, {}).get("device") == "nvme"
    ]


def _check_extra(extra: Mapping[str, Any], owned: Mapping[str, Owned]) -> None:
    for name, value in flatten(extra):
        option = f"engine.deepspeed.{name}"
        require(
            name != "gradient_accumulation_steps",
            f"{option} ({value}) must not be given: train.global_batch_size and "
            "train.micro_batch_size decide it",
        )
        for section, instead in _INSTEAD.items():
            require(
                not f"{name}.".startswith(f"{section}."),
                f"{option} ({json.dumps(value)}) must not be given: {instead} decides it here",
            )
        if name in owned:
            require(
                value == owned[name].value,
                f"{option} ({json.dumps(value)}) must not differ from {owned[name].option} "
                f"({json.dumps(owned[name].value)})",
            )
        broken = rule_for(name, value)
        require(broken is None, f"{option} ({json.dumps(value):.60}) {broken}")
