"""Train a small model by an engine at some layout and bring home what it reported and holds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron.data.sampler import microbatch_samples
from megatron.engine.base import StepResult
from megatron.engine.torch_engine import TorchEngine
from megatron.model.inputs import ModelInputs, build_inputs
from megatron.optim.schedule import learning_rate
from mpu import ParallelDims, ParallelGroups, ShardSpec, build_groups
from tests.distributed import run_ranks
from tests.shards import join

VOCAB, SEQ, NUM_HEADS, EOD = 101, 16, 4, 5
GLOBAL_BATCH = 4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Layout:
    """How training is spread over ranks, and how many samples go in one microbatch."""

    tensor: int = 1
    data: int = 1
    sequence: bool = False
    micro_batch: int = 1

    def __str__(self) -> str:
        words = f"tensor {self.tensor}{' sequence' if self.sequence else ''}, data {self.data}"
        return f"{words}, accumulation {GLOBAL_BATCH // self.data // self.micro_batch}"


def make_config(
    layout: Layout,
    dtype: Literal["fp32", "bf16", "fp64"] = "fp64",
    layernorm: Literal["torch", "apex"] = "torch",
    optimizer: Literal["adamw", "apex_adamw"] = "adamw",
) -> Config:
    """A run with dropout, warm-up, and gradients that clipping cuts."""
    return Config(
        folder=Path("run"),
        model=ModelConfig(
            num_layers=2,
            hidden_size=16,
            num_heads=NUM_HEADS,
            vocab_size=VOCAB,
            seq_length=SEQ,
            vocab_padding_multiple=8,
            hidden_dropout=0.1,
            attention_dropout=0.1,
            layernorm=layernorm,
        ),
        train=TrainConfig(
            samples=100,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=layout.micro_batch,
            dtype=dtype,
        ),
        # Says that there is a tokenizer; the engine never reads it.
        data=DataConfig(tokenizer=Path("tokenizer"), eod_mask_loss=True),
        parallel=ParallelConfig(tensor=layout.tensor, data=layout.data, sequence=layout.sequence),
        optimizer=OptimizerConfig(
            name=optimizer, lr=1e-2, warmup_samples=20, max_grad_norm=0.5, weight_decay=0.1
        ),
    )


def build_engine(config: Config) -> tuple[TorchEngine, ParallelGroups]:
    """The engine of this rank."""
    data = config.parallel.data or 1
    groups = build_groups(ParallelDims(tensor=config.parallel.tensor, data=data))
    return TorchEngine(config, groups, CPU, "blocked"), groups


def microbatches(config: Config, step: int, groups: ParallelGroups) -> list[ModelInputs]:
    """What this rank reads in ``step``."""
    data = groups.data
    parts = microbatch_samples(
        step * GLOBAL_BATCH, GLOBAL_BATCH, config.train.micro_batch_size, data.rank(), data.size()
    )
    return [_inputs(config, part) for part in parts]


def _inputs(config: Config, samples: range) -> ModelInputs:
    tokens = torch.stack([_sample(number) for number in samples])
    numbers = torch.tensor(list(samples))
    return build_inputs(tokens, numbers, config.data, EOD, config.train.torch_dtype)


def _sample(number: int) -> torch.Tensor:
    """Random tokens, of which a share that depends on the sample, none to all, count not."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(EOD + 1, VOCAB, (SEQ + 1,), generator=generator)
    tokens[: (number * 7) % (SEQ + 2)] = EOD
    return tokens


def train(
    engine: TorchEngine, config: Config, groups: ParallelGroups, steps: range
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


_LocalState = dict[str, tuple[torch.Tensor, ShardSpec]]


def run_training(layout: Layout, num_steps: int) -> Run:
    """Train in float64; fails if ranks report or hold different things."""
    ranks = run_ranks(layout.tensor * layout.data, _train_rank, layout, num_steps)
    assert all(rank[:2] == ranks[0][:2] for rank in ranks), "ranks report different numbers"
    results, evaluation, local = ranks[0]
    for name, (tensor, spec) in local.items():
        others = range(0, len(ranks), layout.tensor if spec.dim is not None else 1)
        copies = [ranks[rank][2][name][0] for rank in others]
        assert all(torch.equal(copy, tensor) for copy in copies), f"replicas of {name} differ"
    parts = ranks[: layout.tensor]
    state = {
        name: join([part[2][name][0] for part in parts], spec) for name, (_, spec) in local.items()
    }
    return Run(results, evaluation, state)


def _train_rank(layout: Layout, num_steps: int) -> tuple[list[StepResult], float, _LocalState]:
    config = make_config(layout)
    engine, groups = build_engine(config)
    results = list(train(engine, config, groups, range(num_steps)))
    evaluation = engine.evaluate(microbatches(config, num_steps, groups))
    state = {f"{s.kind} of {s.name}": (s.tensor, s.spec) for s in engine.named_state()}
    return results, evaluation, state


def spoiled(inputs: ModelInputs) -> ModelInputs:
    """``inputs`` whose loss is not a number."""
    return replace(inputs, loss_weights=inputs.loss_weights * torch.nan)
