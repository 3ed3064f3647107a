"""The search tries every layout that the config's rules accept, and ranks those that fit."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron.config import Config, ModelConfig, ParallelConfig, RampupConfig, TrainConfig
from megatron.errors import ConfigError
from megatron.planning.cluster import CLUSTERS, GIB, Cluster
from megatron.planning.count import count_ranks
from megatron.planning.search import Candidate, search
from megatron.planning.step_time import step_time
from mpu import ParallelDims
from tests.figures import Figure

SMALL = Config(
    folder=Path("run"),
    model=ModelConfig(
        num_layers=8, hidden_size=2048, num_heads=16, vocab_size=50_000, seq_length=2048
    ),
    train=TrainConfig(samples=640, global_batch_size=64, dtype="bf16"),
)
NODE = replace(CLUSTERS["h100"], gpus=4, gpus_per_node=4)

# The options of the run whose steps took 104.5 s, in a setting that its authors had: every layer
# recomputed, 1f1b, no sequence parallelism.
BLOOM = Config(
    folder=Path("run"),
    model=ModelConfig(
        num_layers=70,
        hidden_size=14336,
        num_heads=112,
        vocab_size=250_880,
        seq_length=2048,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        attention_backend="explicit",
    ),
    train=TrainConfig(
        samples=220_000_000,
        global_batch_size=2048,
        micro_batch_size=2,
        rampup=RampupConfig(start=192, increment=16, samples=9_765_625),
        dtype="bf16",
        recompute="full",
    ),
    parallel=ParallelConfig(tensor=4, pipeline=12, zero=1, partition="count"),
)


def grid(candidate: Candidate) -> tuple[int, int, int]:
    dims = candidate.dims
    return dims.tensor, dims.pipeline, dims.data


def test_layouts_are_ranked_by_time_and_fit() -> None:
    found = search(SMALL, NODE)
    times = [candidate.time.total for candidate in found.candidates]
    assert times == sorted(times)
    for candidate in found.candidates:
        assert candidate.config.layout(NODE.gpus) == candidate.dims
        assert candidate.count == count_ranks(candidate.config, candidate.dims, NODE.memory)
        assert candidate.count.needed <= NODE.memory
        assert candidate.time == step_time(candidate.config, candidate.dims, NODE)


def test_every_grid_of_the_cluster_is_tried() -> None:
    grids = {grid(candidate) for candidate in search(SMALL, NODE).candidates}
    assert grids == {(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)}


def test_no_layout_stands_there_twice() -> None:
    configs = [(c.config.parallel, c.config.train) for c in search(SMALL, NODE).candidates]
    assert len({str(config) for config in configs}) == len(configs)


def test_less_memory_leaves_fewer_layouts() -> None:
    roomy, tight = (search(SMALL, replace(NODE, memory=gib * GIB)) for gib in (80, 24))
    total = len(roomy.candidates) + roomy.num_too_large
    assert len(tight.candidates) + tight.num_too_large == total
    assert 0 < len(tight.candidates) < len(roomy.candidates)


def test_slow_network_keeps_the_tensor_ranks_apart() -> None:
    slow = replace(NODE, intra_bandwidth=1e9)
    assert search(SMALL, NODE).candidates[0].dims != ParallelDims(tensor=4)
    assert search(SMALL, slow).candidates[0].dims.tensor == 1


@pytest.mark.parametrize(
    ("config", "cluster", "message"),
    [
        (SMALL, replace(NODE, memory=6 * GIB), "fits in 6 GiB each; the least needs"),
        (SMALL, replace(NODE, gpus=6400), "no layout of 6400 GPUs takes this config"),
        (
            replace(SMALL, train=replace(SMALL.train, dtype="fp32")),
            NODE,
            "train.dtype must be bf16 or fp16 to plan, got fp32",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(config: Config, cluster: Cluster, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(config, cluster)


def test_own_layout_of_bloom_is_among_the_best_of_its_kind(figure: Figure) -> None:
    cluster = replace(CLUSTERS["a100"], gpus=384, launch_seconds=40e-6, overlaps=False)
    alike = [
        candidate
        for candidate in search(BLOOM, cluster).candidates
        if candidate.config.train.recompute == "full"
        and candidate.config.parallel.schedule == "1f1b"
        and not candidate.config.parallel.sequence
    ]
    (own,) = (c for c in alike if c.is_layout_of(BLOOM))
    best = alike[0]
    figure(
        "layout of BLOOM-176B among those that it could have",
        place=alike.index(own) + 1,
        of=len(alike),
        slower_than_the_best=own.time.total / best.time.total,
    )
    assert grid(own) == (4, 12, 8)
    assert alike.index(own) < 3
    assert own.time.total < 1.05 * best.time.total
