"""Memory by formula against what is counted on the engine that a dry run builds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron.config import Config, ModelConfig, ParallelConfig, TrainConfig
from megatron.engine.schedules import Pass, Plan, plan_training
from megatron.planning.memory import Memory, fullest_rank, passes_under_way, rank_memory
from megatron.training.dry_run import RankCount, dry_run
from mpu import ParallelDims
from tests.figures import Figure

CHUNK = 2**26
"""Bytes of a chunk of the head where there is no GPU: what would be a 64th of its memory."""


@dataclass(frozen=True)
class Case:
    """What differs from a plain run."""

    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = {**self.parallel, **self.model, **self.train}
        return " ".join(f"{name}={value}" for name, value in options.items()) or "plain"

    @property
    def config(self) -> Config:
        shape: dict[str, Any] = {
            "num_layers": 8,
            "hidden_size": 256,
            "num_heads": 8,
            "vocab_size": 5000,
            "seq_length": 512,
        }
        train: dict[str, Any] = {"samples": 64, "global_batch_size": 32, "micro_batch_size": 2}
        return Config(
            folder=Path("run"),
            model=ModelConfig(**(shape | self.model)),
            train=TrainConfig(**(train | {"dtype": "bf16"} | self.train)),
            parallel=ParallelConfig(**self.parallel),
        )


LAYOUTS = [
    Case(),
    Case({"tensor": 2, "sequence": True}, train={"dtype": "fp32"}),
    Case({"pipeline": 4, "data": 2, "zero": 1}),
    Case({"pipeline": 2, "data": 4, "zero": 1, "tensor": 2, "sequence": True}),
    Case({"pipeline": 4, "schedule": "interleaved_1f1b", "chunks": 2}),
    Case({"pipeline": 4, "schedule": "zero_bubble", "data": 2}, {"tie_embeddings": False}),
    Case({"data": 2, "zero": 2}),
    Case({"data": 2, "pipeline": 2, "zero": 3}, train={"recompute": "full"}),
]
MODELS = [
    Case({"tensor": 2}, train={"recompute": "selective"}),
    Case({"tensor": 2}, train={"recompute": "full"}),
    Case(model={"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    Case(model={"attention_backend": "explicit"}, train={"dtype": "fp32"}),
    Case(
        model={"attention_backend": "explicit", "attention_dropout": 0.1}, train={"dtype": "fp32"}
    ),
    Case(model={"activation": "swiglu", "position_embedding": "learned"}),
    Case(model={"activation": "liglu", "ffn_hidden_size": 512, "pooler": True}),
    Case(model={"num_token_types": 2, "embedding_layernorm": False}, train={"micro_batch_size": 1}),
]


def pairs(config: Config) -> list[tuple[Memory, RankCount]]:
    """Formula and count of every rank of the pipeline."""
    found = dry_run(config)
    return [
        (rank_memory(config, found.dims, place, 64 * CHUNK), counted)
        for place, counted in enumerate(found.ranks)
    ]


@pytest.mark.parametrize("case", LAYOUTS + MODELS, ids=str)
def test_formula_agrees_with_what_the_engine_holds(case: Case, figure: Figure) -> None:
    for formula, counted in pairs(case.config):
        state = counted.state
        held = (state.weights, state.gradients, state.optimizer)
        assert (formula.weights, formula.gradients, formula.optimizer) == held
        activations = formula.activations / counted.activations
        total = formula.total / counted.total
        figure(f"memory by formula / counted: {case}", activations=activations, total=total)
        assert activations == pytest.approx(1, abs=0.1)
        assert total == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("microbatches", [4, 8, 20])
@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(pipeline=4),
        ParallelConfig(pipeline=4, schedule="interleaved_1f1b", chunks=2),
        ParallelConfig(pipeline=4, schedule="zero_bubble"),
    ],
    ids=lambda parallel: parallel.schedule,
)
def test_passes_under_way_are_those_of_the_plan(
    parallel: ParallelConfig, microbatches: int
) -> None:
    train = {"global_batch_size": 2 * microbatches}
    config = Case(vars(parallel), train=train).config
    plan = plan_training(parallel.schedule, 4, parallel.chunks, microbatches)
    for rank in range(4):
        found = passes_under_way(config, ParallelDims(pipeline=4), rank)
        assert found == most_under_way(plan, rank)


def most_under_way(plan: Plan, rank: int) -> int:
    most = count = 0
    for task in plan.tasks(rank):
        count += {Pass.FORWARD: 1, Pass.WEIGHT: 0}.get(task.kind, -1)
        most = max(most, count)
    return most


def test_fullest_rank_has_the_most_of_all() -> None:
    config, dims = Case({"pipeline": 4}).config, ParallelDims(pipeline=4)
    ranks = [rank_memory(config, dims, rank, 64 * CHUNK) for rank in range(4)]
    fullest = fullest_rank(config, dims, 64 * CHUNK)
    assert fullest.total == max(rank.total for rank in ranks)
    assert fullest.total == fullest.state + fullest.activations + fullest.working
