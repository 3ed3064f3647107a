"""Predicted seconds of a training step.

A microbatch takes t_r on rank r of p. With m microbatches the slowest rank takes m t_max, and the
step is longer for what the pipeline waits:

    fill      the first microbatch goes through the other ranks and back; interleaved stages of v
              chunks wait for one of v parts, zero_bubble for one of three
    round     a rank may have only so many microbatches under way. If these, on their way through
              all ranks, with 2 (p - 1) transfers, take longer than the rank needs for as many,
              it waits for them

Then gradients are summed up over the data ranks, and the optimizer reads and writes its state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.config import Config
from megatron.config.rules import require
from megatron.model.stages import Stage
from megatron.planning.cluster import Cluster
from megatron.planning.communication import num_microbatches, on_wire_per_step, transfer_bytes
from megatron.planning.count import state_bytes
from megatron.planning.kernels import stream_seconds
from megatron.planning.layer_time import PassTime, embedding_time, head_time, layer_time
from megatron.planning.parameters import stages_of
from mpu import ParallelDims


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        passes: of the slowest rank, forward and backward, with the collectives of tensor ranks.
        bubble: that it waits for other ranks of the pipeline.
        reduction: sums of gradients over data ranks, and weights gathered from them.
        update: by the optimizer.
    """

    passes: float
    bubble: float
    reduction: float
    update: float

    @property
    def total(self) -> float:
        return self.passes + self.bubble + self.reduction + self.update

    @property
    def bubble_share(self) -> float:
        """Of the step."""
        return self.bubble / self.total


def require_16_bits(config: Config) -> None:
    """Raise a ConfigError for a precision whose products are not those of data sheets."""
    require(
        config.train.torch_dtype.itemsize == 2,
        f"train.dtype must be bf16 or fp16 to plan, got {config.train.dtype}",
    )


def step_time(config: Config, dims: ParallelDims, cluster: Cluster) -> StepTime:
    """Predict a step of ``config`` on ``cluster``, with stages as the engine cuts them."""
    stages = [stages_of(config, rank) for rank in range(dims.pipeline)]
    return step_time_of(config, dims, cluster, stages)


def step_time_of(
    config: Config, dims: ParallelDims, cluster: Cluster, stages: Sequence[Sequence[Stage]]
) -> StepTime:
    """Predict a step with any stages on each rank of the pipeline."""
    ranks = _rank_times(config, cluster, stages)
    passes = num_microbatches(config, dims) * max(rank.total for rank in ranks)
    return StepTime(
        passes=passes,
        bubble=_pipeline_seconds(config, dims, cluster, ranks) - passes,
        reduction=_reduction_seconds(config, dims, cluster),
        update=_update_seconds(config, dims, cluster),
    )


def _rank_times(
    config: Config, cluster: Cluster, stages: Sequence[Sequence[Stage]]
) -> list[PassTime]:
    """One microbatch through all stages of each rank."""
    layer = layer_time(config, cluster)
    embedding, head = embedding_time(config, cluster), head_time(config, cluster)
    times = []
    for own in stages:
        time = layer * sum(len(stage.layers) for stage in own)
        time += embedding * sum(stage.first for stage in own)
        times.append(time + head * sum(stage.last for stage in own))
    return times


def _pipeline_seconds(
    config: Config, dims: ParallelDims, cluster: Cluster, ranks: Sequence[PassTime]
) -> float:
    """All passes of a step, from the first to the last."""
    slowest = max(rank.total for rank in ranks)
    count, chunks = num_microbatches(config, dims), config.parallel.chunks
    if dims.pipeline == 1:
        return count * slowest
    transfer = transfer_bytes(config) / _pipeline_bandwidth(dims, cluster)
    # Weight gradients that are put off are not on the way of a microbatch, and fill as much of
    # what a rank would wait.
    put_off = config.parallel.schedule == "zero_bubble"
    ways = [rank.total - put_off * rank.weights for rank in ranks]
    waits = [way - put_off * rank.weights for way, rank in zip(ways, ranks, strict=True)]
    round_trip = sum(ways) + 2 * (dims.pipeline * chunks - 1) * transfer
    period = max(slowest, round_trip * chunks / passes_under_way(config, dims, 0))
    fill = (sum(waits) - max(waits)) / chunks + 2 * (dims.pipeline - 1) * transfer
    return (count - 1) * period + slowest + fill


def passes_under_way(config: Config, dims: ParallelDims, pipeline_rank: int) -> int:
    """Passes through a stage that a rank has begun and not taken back, at most.

    On rank i of p, with v chunks: p - i, and 2 (p - i) - 1 + (v - 1) p if interleaved.
    """
    parallel, behind = config.parallel, dims.pipeline - pipeline_rank
    most = behind
    if parallel.chunks > 1:
        most = 2 * behind - 1 + (parallel.chunks - 1) * dims.pipeline
    return min(most, parallel.chunks * num_microbatches(config, dims))


def _reduction_seconds(config: Config, dims: ParallelDims, cluster: Cluster) -> float:
    wire = on_wire_per_step(config, dims)
    seconds = wire["data"] / cluster.bandwidth(dims.tensor, dims.data)
    return seconds + wire["embedding"] / _pipeline_bandwidth(dims, cluster)


def _pipeline_bandwidth(dims: ParallelDims, cluster: Cluster) -> float:
    return cluster.bandwidth(dims.tensor * dims.data, dims.pipeline)


def _update_seconds(config: Config, dims: ParallelDims, cluster: Cluster) -> float:
    """All state is read and written, gradients also to zero, to measure and to clip them."""
    ranks = (state_bytes(config, dims, rank) for rank in range(dims.pipeline))
    most = max(ranks, key=lambda state: state.total)
    return stream_seconds(cluster, 2 * most.weights + 5 * most.gradients + 2 * most.optimizer)
