"""Stages share out all layers, and the largest is as small as can be."""

from itertools import combinations
from typing import Literal

import pytest

from megatron.config import ModelConfig, ParallelConfig
from megatron.model.flops import head_flops, layer_flops
from megatron.model.stages import Stage, build_stages, whole_model

BLOOM_176B = ModelConfig(
    num_layers=70, hidden_size=14336, num_heads=112, vocab_size=250880, seq_length=2048
)
PARTITIONS: list[Literal["cost", "count"]] = ["cost", "count"]


def make_model(num_layers: int, vocab_size: int = 1000) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers, hidden_size=64, num_heads=4, vocab_size=vocab_size, seq_length=32
    )


def make_parallel(
    pipeline: int, chunks: int = 1, partition: Literal["cost", "count"] = "cost"
) -> ParallelConfig:
    return ParallelConfig(
        pipeline=pipeline,
        chunks=chunks,
        schedule="interleaved_1f1b" if chunks > 1 else "1f1b",
        partition=partition,
    )


def sizes(stages: list[Stage]) -> list[int]:
    return [len(stage.layers) for stage in stages]


def test_bloom_by_count_is_shared_out_as_in_its_own_run() -> None:
    stages = build_stages(BLOOM_176B, make_parallel(12, partition="count"))
    assert sizes(stages) == [5, *[6] * 10, 5]


def test_bloom_by_cost_relieves_the_stage_with_the_head() -> None:
    """Its head costs as much as 1.4 layers, and its embedding nothing."""
    assert head_flops(BLOOM_176B) / layer_flops(BLOOM_176B) == pytest.approx(1.4, abs=0.05)
    stages = build_stages(BLOOM_176B, make_parallel(12))
    assert sizes(stages) == [*[6] * 11, 4]


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize(("pipeline", "chunks"), [(1, 1), (2, 1), (3, 1), (5, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("num_layers", [9, 10, 13, 24])
def test_every_layer_is_in_one_stage_in_order(
    num_layers: int, pipeline: int, chunks: int, partition: Literal["cost", "count"]
) -> None:
    stages = build_stages(make_model(num_layers), make_parallel(pipeline, chunks, partition))
    assert len(stages) == pipeline * chunks
    assert [layer for stage in stages for layer in stage.layers] == list(range(num_layers))
    assert all(len(stage.layers) > 0 for stage in stages)
    assert [stage.first for stage in stages] == [index == 0 for index in range(len(stages))]
    assert [stage.last for stage in stages] == [stage is stages[-1] for stage in stages]


def test_one_stage_is_the_whole_model() -> None:
    model = make_model(5)
    assert build_stages(model, make_parallel(1)) == [whole_model(model)]
    assert whole_model(model) == Stage(range(5), first=True, last=True)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("vocab_size", [50, 1000, 5000])
@pytest.mark.parametrize("num_layers", range(2, 10))
@pytest.mark.parametrize("pipeline", [2, 3, 4])
def test_the_largest_stage_is_the_least_possible(
    num_layers: int, pipeline: int, vocab_size: int, partition: Literal["cost", "count"]
) -> None:
    """Of all ways to share the layers out, tried one by one."""
    num_stages = min(pipeline, num_layers)
    model = make_model(num_layers, vocab_size)
    ends = {
        "count": (1.0, 1.0),
        "cost": (0.0, head_flops(model) / layer_flops(model)),
    }[partition]
    found = sizes(build_stages(model, make_parallel(num_stages, partition=partition)))
    ways = [
        [b - a for a, b in zip((0, *cuts), (*cuts, num_layers), strict=True)]
        for cuts in combinations(range(1, num_layers), num_stages - 1)
    ]
    assert largest(found, *ends) == min(largest(way, *ends) for way in ways)


def largest(layers: list[int], embedding: float, head: float) -> float:
    """Work of the stage with the most, in layers."""
    work = [float(size) for size in layers]
    work[0] += embedding
    work[-1] += head
    return max(work)


def test_of_equal_stages_the_last_has_more() -> None:
    """The earlier a stage, the more microbatches it holds activations of."""
    assert sizes(build_stages(make_model(6), make_parallel(3, partition="count"))) == [1, 3, 2]
