"""The search and the dry run give one answer, and parts of a model add up to whole stages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.config import Config, ModelConfig, ParallelConfig, TrainConfig
from megatron.engine.schedules import Pass, Plan, plan_training
from megatron.model.stages import Stage
from megatron.planning.cluster import GIB, cluster_of
from megatron.planning.count import allowance, count, pass_shape
from megatron.planning.pass_bytes import PassBytes, most_held, stage_bytes
from megatron.planning.search import search
from megatron.planning.step_time import passes_under_way
from mpu import ParallelDims
from tests.megatron.planning.whole_stage import measure_whole

PLAIN = ModelConfig(num_layers=8, hidden_size=256, num_heads=8, vocab_size=5000, seq_length=512)


def make(
    parallel: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
) -> Config:
    options: dict[str, Any] = {"samples": 64, "global_batch_size": 32, "micro_batch_size": 2}
    return Config(
        folder=Path("run"),
        model=replace(PLAIN, **(model or {})),
        train=TrainConfig(**(options | {"dtype": "bf16"} | (train or {}))),
        parallel=ParallelConfig(**{"data": 1, **(parallel or {})}),
    )


CONFIGS = [
    make(),
    make({"tensor": 2}),
    make({"tensor": 2, "sequence": True}, train={"recompute": "selective"}),
    make({"data": 4}),
    make({"data": 4, "zero": 1}, train={"recompute": "full"}),
    make({"tensor": 2, "data": 2, "zero": 1}, {"tie_embeddings": False}),
    make({"pipeline": 4}),
    make({"pipeline": 2, "data": 2, "zero": 1}, {"hidden_dropout": 0.1}),
    make({"pipeline": 2, "schedule": "interleaved_1f1b", "chunks": 2}),
    make({"pipeline": 4, "schedule": "zero_bubble"}, {"attention_dropout": 0.1}),
    make({"pipeline": 2, "schedule": "zero_bubble", "tensor": 2, "sequence": True}),
    make({"pipeline": 2, "partition": "count"}, {"activation": "swiglu"}, {"micro_batch_size": 4}),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_search_and_dry_run_count_the_same_bytes(config: Config) -> None:
    dry = count(config)
    cluster = cluster_of("a100", dry.dims.world_size)
    (own,) = [c for c in search(config, cluster).candidates if c.is_layout_of(config)]
    assert own.count.ranks == dry.ranks
    assert own.count.needed == dry.fullest.total + allowance(config) == dry.needed
    assert allowance(config) == 4 * GIB


@pytest.mark.parametrize(
    "config",
    [
        make(),
        make({"tensor": 2, "sequence": True}, train={"dtype": "fp32", "recompute": "selective"}),
        make({"tensor": 2}, {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
        make({"pipeline": 2, "schedule": "zero_bubble"}, {"hidden_dropout": 0.1}),
        make(model={"position_embedding": "learned", "activation": "swiglu"}),
        make(model={"attention_backend": "explicit"}, train={"recompute": "full"}),
        make(model={"pooler": True, "tie_embeddings": False, "embedding_layernorm": False}),
    ],
    ids=range(7),
)
def test_parts_add_up_to_stages_with_all_their_layers(config: Config) -> None:
    shape = pass_shape(config)
    for stage in (
        Stage(range(5)),
        Stage(range(1), last=False),
        Stage(range(4), last=False),
        Stage(range(3), first=False, last=False),
        Stage(range(2), first=False),
    ):
        parts, whole = vars(stage_bytes(shape, stage)), vars(measure_whole(shape, stage))
        # Of scalars, some are dropped sooner.
        assert all(abs(size - whole[name]) <= 8 for name, size in parts.items()), (stage, parts)


SCHEDULES = [
    ParallelConfig(pipeline=4),
    ParallelConfig(pipeline=4, schedule="interleaved_1f1b", chunks=2),
    ParallelConfig(pipeline=4, schedule="interleaved_1f1b", chunks=3),
    ParallelConfig(pipeline=4, schedule="zero_bubble"),
]


@pytest.mark.parametrize("parallel", SCHEDULES, ids=lambda p: f"{p.schedule} {p.chunks}")
def test_most_held_is_that_of_the_whole_step(parallel: ParallelConfig) -> None:
    passes = [
        PassBytes(kept=10 + chunk, forward=14, backward=20, deferred=5, weight=9)
        for chunk in range(parallel.chunks)
    ]
    for microbatches in (4, 8, 40):
        plan = plan_training(parallel.schedule, 4, parallel.chunks, microbatches)
        for rank in range(4):
            found = most_held(parallel, rank, microbatches, passes)
            assert found == held_in(plan, rank, passes)


def held_in(plan: Plan, rank: int, passes: list[PassBytes]) -> tuple[int, int]:
    """Task by task."""
    held = most_kept = most = 0
    for task in plan.tasks(rank):
        of = passes[task.stage // 4]
        if task.kind is Pass.FORWARD:
            most, held = max(most, held + of.forward), held + of.kept
        elif task.kind is Pass.WEIGHT:
            most, held = max(most, held - of.deferred + of.weight), held - of.deferred
        else:
            most, held = max(most, held - of.kept + of.backward), held - of.kept
            held += of.deferred if task.kind is Pass.INPUT else 0
        most_kept = max(most_kept, held)
    return most_kept, most


@pytest.mark.parametrize("microbatches", [4, 8, 20])
@pytest.mark.parametrize("parallel", SCHEDULES, ids=lambda p: f"{p.schedule} {p.chunks}")
def test_passes_under_way_are_those_of_the_plan(
    parallel: ParallelConfig, microbatches: int
) -> None:
    config = make(
        {**vars(parallel), "data": 1},
        model={"num_layers": 4 * parallel.chunks},
        train={"global_batch_size": 2 * microbatches},
    )
    plan = plan_training(parallel.schedule, 4, parallel.chunks, microbatches)
    for rank in range(4):
        found = passes_under_way(config, ParallelDims(pipeline=4), rank)
        assert found == most_under_way(plan, rank)


def most_under_way(plan: Plan, rank: int) -> int:
    most = begun = 0
    for task in plan.tasks(rank):
        begun += {Pass.FORWARD: 1, Pass.WEIGHT: 0}.get(task.kind, -1)
        most = max(most, begun)
    return most
