"""Predicted step times, against theory and against what BLOOM's authors measured."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from megatron.config import (
    Config,
    ModelConfig,
    ParallelConfig,
    Recompute,
    ScheduleName,
    TrainConfig,
)
from megatron.engine.schedules import ideal_idle_share
from megatron.model.flops import flops_per_token
from megatron.model.stages import Stage, build_stages
from megatron.planning.cluster import CLUSTERS, Cluster
from megatron.planning.step_time import StepTime, step_time, step_time_of
from mpu import ParallelDims
from tests.figures import Figure
from tests.megatron.planning.bloom_runs import BALANCED, BY_LAYERS, Run

# The runs had CUDA_LAUNCH_BLOCKING=1: each kernel waits for Python and the driver, and a collective
# has nothing beside it.
BLOOM_NODES = replace(CLUSTERS["a100"], launch_seconds=40e-6, overlaps=False)


def run_config(run: Run) -> Config:
    """The options of ours that do what BLOOM's implementation did."""
    return Config(
        folder=Path("run"),
        model=ModelConfig(
            num_layers=run.layers,
            hidden_size=run.hidden,
            num_heads=run.heads,
            vocab_size=250_880,
            seq_length=2048,
            hidden_dropout=0.1,
            attention_dropout=0.1,
            attention_backend="explicit",
        ),
        train=TrainConfig(
            samples=run.batch,
            global_batch_size=run.batch,
            micro_batch_size=run.micro_batch,
            dtype="bf16",
            recompute="full",
        ),
        parallel=ParallelConfig(
            tensor=run.tensor, pipeline=run.pipeline, zero=1, partition="count"
        ),
    )


def predict(run: Run, stages: list[Stage]) -> StepTime:
    dims = ParallelDims(tensor=run.tensor, data=run.data, pipeline=run.pipeline)
    cluster = replace(BLOOM_NODES, gpus=run.gpus)
    return step_time_of(run_config(run), dims, cluster, [[stage] for stage in stages])


def balanced(run: Run) -> list[Stage]:
    config = run_config(run)
    return build_stages(config.model, config.parallel)


def by_layers(run: Run) -> list[Stage]:
    """As many layers on each stage; the last has what is left of them."""
    ranks, layers = run.pipeline, range(run.layers)
    size = -(-run.layers // ranks)
    cuts = [layers[rank * size : (rank + 1) * size] for rank in range(ranks)]
    return [Stage(own, rank == 0, rank == ranks - 1) for rank, own in enumerate(cuts)]


def teraflops(run: Run, seconds: float) -> float:
    """Of the model, on each GPU."""
    tokens = run.batch * 2048
    return flops_per_token(run_config(run).model, "full") * tokens / seconds / run.gpus / 1e12


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's: the correlation of the places that numbers have among their kind."""
    return float(np.corrcoef(places(a), places(b))[0, 1])


def places(values: ArrayLike) -> NDArray[np.float64]:
    """The place of each number in order, equal ones in the middle of theirs."""
    array = np.asarray(values, dtype=float)
    below = (array[None, :] < array[:, None]).sum(1)
    return below + ((array[None, :] == array[:, None]).sum(1) - 1) / 2


def test_layouts_rank_as_bloom_measured_them(figure: Figure) -> None:
    predicted = [(run, predict(run, by_layers(run)).total) for run in BY_LAYERS]
    predicted += [(run, predict(run, balanced(run)).total) for run in BALANCED]
    speeds = [(teraflops(run, run.seconds), teraflops(run, s)) for run, s in predicted]
    measured, ours = zip(*speeds, strict=True)
    ratios = np.array([seconds / run.seconds for run, seconds in predicted])
    spearman = rank_correlation(measured, ours)
    # Heads that no tensor core can read are the greatest difference; without them:
    aligned = [pair for pair, (run, _) in zip(speeds, predicted, strict=True) if run.is_aligned]
    figure(
        "planner against BLOOM's measurements",
        rows=len(ratios),
        spearman=spearman,
        rows_of_aligned_heads=len(aligned),
        spearman_of_aligned_heads=rank_correlation(*zip(*aligned, strict=True)),
        median_predicted_over_measured=float(np.median(ratios)),
        within_a_fifth=float((abs(np.log(ratios)) < np.log(1.2)).mean()),
    )
    assert spearman >= 0.85


def test_rank_correlation_of_equal_and_of_opposite_order() -> None:
    assert rank_correlation([1, 5, 7], [2, 3, 90]) == pytest.approx(1)
    assert rank_correlation([1, 5, 7], [9, 3, 1]) == pytest.approx(-1)


def test_step_of_bloom_itself_is_predicted_within_a_tenth(figure: Figure) -> None:
    (run,) = [run for run in BALANCED if (run.layers, run.heads, run.tensor) == (70, 112, 4)]
    seconds = predict(run, balanced(run)).total
    figure("step of BLOOM-176B", predicted_seconds=seconds, measured_seconds=run.seconds)
    assert seconds == pytest.approx(run.seconds, rel=0.1)


NODE = replace(CLUSTERS["h100"], intra_bandwidth=1e20, inter_bandwidth=1e20)


SHAPE = ModelConfig(num_layers=16, hidden_size=2048, num_heads=16, vocab_size=2, seq_length=2048)
"""Equal layers, to which embedding and head add next to nothing."""


def plan(
    parallel: ParallelConfig,
    model: ModelConfig = SHAPE,
    recompute: Recompute = "none",
    cluster: Cluster = NODE,
) -> StepTime:
    """A step on as many GPUs as the tensor and pipeline ranks take."""
    train = TrainConfig(samples=64, global_batch_size=64, dtype="bf16", recompute=recompute)
    config = Config(folder=Path("run"), model=model, train=train, parallel=parallel)
    gpus = parallel.tensor * parallel.pipeline
    return step_time(config, config.layout(gpus), replace(cluster, gpus=gpus))


@pytest.mark.parametrize(
    ("schedule", "chunks"), [("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 4)]
)
def test_bubble_of_equal_stages_is_that_of_the_schedule(
    schedule: ScheduleName, chunks: int
) -> None:
    time = plan(ParallelConfig(pipeline=4, schedule=schedule, chunks=chunks))
    share = time.bubble / (time.passes + time.bubble)
    assert share == pytest.approx(ideal_idle_share(schedule, 4, chunks, 64), rel=0.02)


def test_zero_bubble_waits_for_what_is_not_a_weight_gradient() -> None:
    plain = plan(ParallelConfig(pipeline=4)).bubble
    zero = plan(ParallelConfig(pipeline=4, schedule="zero_bubble")).bubble
    assert 0.2 * plain < zero < 0.5 * plain


def test_slow_links_make_the_pipeline_wait() -> None:
    fast, slow = (
        plan(ParallelConfig(pipeline=4), cluster=replace(NODE, intra_bandwidth=bandwidth))
        for bandwidth in (1e20, 10e9)
    )
    assert slow.passes == fast.passes
    assert slow.bubble > 1.5 * fast.bubble


def test_recomputation_costs_up_to_a_forward_pass() -> None:
    none, selective, full = (
        plan(ParallelConfig(), recompute=recompute).passes
        for recompute in ("none", "selective", "full")
    )
    assert none < selective < full
    # Without recomputation a backward pass is somewhat more than two forward passes.
    assert 1.25 < full / none < 4 / 3


def test_heads_that_tensor_cores_cannot_read_are_slow() -> None:
    shape = replace(SHAPE, hidden_size=1728, attention_backend="explicit")
    of_144, of_108 = (
        plan(ParallelConfig(), replace(shape, num_heads=heads)).passes for heads in (12, 16)
    )
    assert of_108 > 1.2 * of_144
