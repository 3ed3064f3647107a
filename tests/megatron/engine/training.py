"""Train a small model by an engine at some layout and bring home what it reported and holds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist

from megatron.config import (
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recompute,
    ScheduleName,
    TrainConfig,
)
from megatron.data.sampler import microbatch_samples
from megatron.engine.base import Engine, StepResult
from megatron.engine.torch_engine import TorchEngine
from megatron.model.inputs import ModelInputs, build_inputs
from megatron.optim.schedule import learning_rate
from mpu import ParallelGroups, ShardedTensor, build_groups
from tests.distributed import preload, run_ranks
from tests.shards import region

VOCAB, SEQ, NUM_LAYERS, NUM_HEADS, EOD = 101, 16, 4, 4, 5
GLOBAL_BATCH = 8
CPU = torch.device("cpu")


Dtype: TypeAlias = Literal["fp32", "bf16", "fp16", "fp64"]

# DeepSpeed's option that keeps the optimizer's state in the memory of the CPU.
_OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@dataclass(frozen=True)
class Layout:
    """How training is spread over ranks, and how many samples go in one microbatch."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: Literal[0, 1, 2, 3] = 0
    sequence: bool = False
    micro_batch: int = 1
    schedule: ScheduleName = "1f1b"
    chunks: int = 1
    tied: bool = True
    recompute: Recompute = "none"
    num_layers: int = NUM_LAYERS
    engine: Literal["torch", "deepspeed"] = "torch"
    offload: bool = False

    def __str__(self) -> str:
        words = [f"tensor {self.tensor}{' sequence' if self.sequence else ''}"]
        if self.pipeline > 1:
            words.append(f"pipeline {self.pipeline} {self.schedule}")
        words.append(f"data {self.data}{f' zero {self.zero}' if self.zero else ''}")
        words += [] if self.tied else ["untied"]
        words += [] if self.recompute == "none" else [f"recompute {self.recompute}"]
        words += [] if self.engine == "torch" else [self.engine]
        words += ["offload"] if self.offload else []
        words.append(f"accumulation {GLOBAL_BATCH // self.data // self.micro_batch}")
        return ", ".join(words)

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


def make_config(
    layout: Layout,
    dtype: Dtype | None = None,
    layernorm: Literal["torch", "apex"] = "torch",
    optimizer: Literal["adamw", "apex_adamw"] = "adamw",
) -> Config:
    """A run with dropout, warm-up, and gradients that clipping cuts.

    Without a dtype it is the most precise one that the engine has.
    """
    return Config(
        folder=Path("run"),
        model=ModelConfig(
            num_layers=layout.num_layers,
            hidden_size=16,
            num_heads=NUM_HEADS,
            vocab_size=VOCAB,
            seq_length=SEQ,
            vocab_padding_multiple=8,
            hidden_dropout=0.1,
            attention_dropout=0.1,
            layernorm=layernorm,
            tie_embeddings=layout.tied,
        ),
        train=TrainConfig(
            samples=25 * GLOBAL_BATCH,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=layout.micro_batch,
            dtype=dtype or ("fp64" if layout.engine == "torch" else "fp32"),
            recompute=layout.recompute,
        ),
        # Says that there is a tokenizer; the engine never reads it.
        data=DataConfig(tokenizer=Path("tokenizer"), eod_mask_loss=True),
        parallel=ParallelConfig(
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            data=layout.data,
            sequence=layout.sequence,
            zero=layout.zero,
            schedule=layout.schedule,
            chunks=layout.chunks,
        ),
        engine=EngineConfig(name=layout.engine, deepspeed=_OFFLOAD if layout.offload else {}),
        optimizer=OptimizerConfig(
            name=optimizer,
            lr=1e-2,
            warmup_samples=20,
            max_grad_norm=0.5,
            weight_decay=0.1,
            # Adam divides the rounding of a gradient that happens to be almost zero by this.
            eps=1e-6,
        ),
    )


def build_engine(config: Config) -> tuple[TorchEngine, ParallelGroups]:
    """The engine of this rank."""
    groups = build_groups(config.layout(dist.get_world_size()))
    return TorchEngine(config, groups, CPU, "blocked"), groups


def microbatches(config: Config, step: int, groups: ParallelGroups) -> list[ModelInputs]:
    """What this rank reads in ``step``."""
    data, size = groups.data, config.train.least_micro_batch_size
    parts = microbatch_samples(step * GLOBAL_BATCH, GLOBAL_BATCH, size, data.rank(), data.size())
    return [_inputs(config, part) for part in parts]


def _inputs(config: Config, samples: range) -> ModelInputs:
    tokens = torch.stack([make_sample(number) for number in samples])
    numbers = torch.tensor(list(samples))
    dtype = torch.promote_types(config.train.torch_dtype, torch.float32)
    return build_inputs(tokens, numbers, config.data, EOD, dtype)


def make_sample(number: int) -> torch.Tensor:
    """Random tokens, of which a share that depends on the sample, none to all, count not."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(EOD + 1, VOCAB, (SEQ + 1,), generator=generator)
    tokens[: (number * 7) % (SEQ + 2)] = EOD
    return tokens


def build_deepspeed_engine(config: Config, groups: ParallelGroups) -> Engine:
    """The engine of this rank, on DeepSpeed."""
    from deepspeed.accelerator import get_accelerator

    from megatron.engine.deepspeed.engine import DeepSpeedEngine

    # Every processor computes in fp16, and DeepSpeed wants one that does it fast.
    get_accelerator().is_fp16_supported = lambda: True
    return DeepSpeedEngine(config, groups, CPU, "blocked")


DEEPSPEED_KINDS = [
    Layout(data=2, engine="deepspeed"),
    Layout(tensor=2, sequence=True, zero=1, micro_batch=2, engine="deepspeed"),
    Layout(data=2, zero=2, engine="deepspeed"),
    Layout(data=2, zero=3, engine="deepspeed"),
    Layout(pipeline=2, zero=1, micro_batch=2, engine="deepspeed"),
]
"""One of each way that DeepSpeed keeps parameters, and of its pipeline."""

if find_spec("deepspeed") is None:
    DEEPSPEED_KINDS.clear()
else:
    preload("megatron.engine.deepspeed.engine", "deepspeed.runtime.zero.muon.muon_optimizer")


def build_any_engine(config: Config) -> tuple[Engine, ParallelGroups]:
    """The engine of this rank that ``config`` names."""
    if config.engine.name == "deepspeed":
        groups = build_groups(config.layout(dist.get_world_size()))
        return build_deepspeed_engine(config, groups), groups
    return build_engine(config)


def train(
    engine: Engine, config: Config, groups: ParallelGroups, steps: range
) -> Iterator[StepResult]:
    """Make the steps of a run from ``steps.start`` on."""
    for step in steps:
        samples = (step + 1) * GLOBAL_BATCH
        lr = learning_rate(samples, config.optimizer, config.train.samples)
        yield engine.train_step(microbatches(config, step, groups), lr)


@dataclass(frozen=True)
class Run:
    """What a run reported, and the whole state that it ended with, by kind and name."""

    results: list[StepResult]
    evaluation: float
    state: dict[str, torch.Tensor]


def run_training(layout: Layout, num_steps: int, dtype: Dtype = "fp64") -> Run:
    """Train; fails if ranks report or hold different things."""
    ranks = run_ranks(layout.world_size, _train_rank, layout, num_steps, dtype)
    assert all(rank[:2] == ranks[0][:2] for rank in ranks), "ranks report different numbers"
    results, evaluation, _ = ranks[0]
    return Run(results, evaluation, join_states([state for *_, state in ranks]))


def join_states(ranks: Sequence[Sequence[ShardedTensor]]) -> dict[str, torch.Tensor]:
    """The whole state of what the ranks hold of it, by kind and name.

    Fails if the owned boxes do not make it up exactly once, or another rank holds something else.
    """
    states = [state for rank in ranks for state in rank]
    whole: dict[str, torch.Tensor] = {}
    for state in (state for state in states if state.owned):
        for box in state.boxes:
            empty = box.tensor.new_full(state.shape, torch.nan)
            part = whole.setdefault(f"{state.kind} of {state.name}", empty)[region(box)]
            assert part.isnan().all(), f"{state.kind} of {state.name} is owned twice"
            part.copy_(box.tensor)
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"a part of {name} is owned by no rank"
    for state in states:
        for box in state.boxes:
            name = f"{state.kind} of {state.name}"
            assert torch.equal(whole[name][region(box)], box.tensor), f"replicas of {name} differ"
    return whole


def _train_rank(
    layout: Layout, num_steps: int, dtype: Dtype
) -> tuple[list[StepResult], float, list[ShardedTensor]]:
    config = make_config(layout, dtype)
    engine, groups = build_any_engine(config)
    results = list(train(engine, config, groups, range(num_steps)))
    evaluation = engine.evaluate(microbatches(config, num_steps, groups))
    return results, evaluation, engine.state()


def spoiled(inputs: ModelInputs, factor: float = torch.nan) -> ModelInputs:
    """``inputs`` whose loss is not a number, or ``factor`` times what it was."""
    return replace(inputs, loss_weights=inputs.loss_weights * factor)
