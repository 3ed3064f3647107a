"""Bytes that a rank needs, by formula.

    state          weights, the buffer that gradients are added up in, optimizer; as kept by
                   megatron/optim
    activations    what one microbatch keeps, times the microbatches that the schedule has under way
    working        what is there for moments: what is computed again, gradients on their way, logits
                   of a chunk, weights that ZeRO gathers

Under way on rank i of p, of m microbatches, are at most

    1f1b                p - i
    interleaved_1f1b    2 (p - i) - 1 + (v - 1) p of the rank's v chunks
    zero_bubble         p - i, and what the weight gradients of i more need
"""

from dataclasses import dataclass

from megatron.config import Config
from megatron.model.stages import Stage
from megatron.planning.activations import (
    deferred_by_layer,
    kept_by_stage,
    recomputed_by_layer,
)
from megatron.planning.communication import num_microbatches
from megatron.planning.parameters import (
    Alike,
    edge_parameters,
    flat_buffer,
    layer_parameters,
    main_dtype,
    parameters_of,
    stages_of,
    vocab_rows,
)
from mpu import ParallelDims

_MOMENTS = 2
"""Numbers of optimizer state for each parameter."""

_LOGIT_SHARE = 1 / 64
"""Share of a GPU's memory for the logits of a chunk of the head, in float32."""

_LOGIT_COPIES = 2
"""Logits of a chunk and their gradient, as they come and in float32."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank; see the head of the module."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def state(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.state + self.activations + self.working


def fullest_rank(config: Config, dims: ParallelDims, gpu_memory: float) -> Memory:
    """The memory of the rank that needs the most.

    Args:
        gpu_memory: bytes of a GPU, of which the head takes a share.
    """
    ranks = (rank_memory(config, dims, rank, gpu_memory) for rank in range(dims.pipeline))
    return max(ranks, key=lambda memory: memory.total)


def rank_memory(
    config: Config, dims: ParallelDims, pipeline_rank: int, gpu_memory: float
) -> Memory:
    """The memory of a rank of that place in the pipeline."""
    stages = stages_of(config, pipeline_rank)
    weights, gradients, optimizer = state_bytes(config, dims, pipeline_rank)
    activations = _activations(config, dims, pipeline_rank, stages)
    in_passes = _pass_bytes(config, stages, gpu_memory) + _gathered(config, stages)
    # After the update, when activations are gone, ZeRO 1 gathers the weights beside themselves.
    in_update = weights if config.parallel.zero == 1 and dims.data > 1 else 0
    working = max(in_passes, in_update - activations)
    return Memory(weights, gradients, optimizer, activations, working)


def passes_under_way(config: Config, dims: ParallelDims, pipeline_rank: int) -> int:
    """Passes through a stage that a rank has begun and not taken back, at most."""
    parallel, behind = config.parallel, dims.pipeline - pipeline_rank
    most = behind
    if parallel.chunks > 1:
        most = 2 * behind - 1 + (parallel.chunks - 1) * dims.pipeline
    return min(most, parallel.chunks * num_microbatches(config, dims))


def state_bytes(config: Config, dims: ParallelDims, pipeline_rank: int) -> tuple[int, int, int]:
    """Weights, gradients and optimizer, as ``Memory`` has them."""
    parameters = parameters_of(config, stages_of(config, pipeline_rank))
    own, main = config.train.torch_dtype.itemsize, main_dtype(config).itemsize
    if config.parallel.zero >= 2:
        part = main * sum(one.count * one.rows(dims.data) for one in parameters)
        return part, part, _MOMENTS * part
    shards = dims.data if config.parallel.zero == 1 else 1
    shard = flat_buffer(parameters).shard(shards)
    # In full precision the weights are the main parameters.
    kept_apart = 1 if own < main else 0
    return shard * shards * own, shard * shards * main, (_MOMENTS + kept_apart) * shard * main


def _activations(config: Config, dims: ParallelDims, rank: int, stages: list[Stage]) -> int:
    kept = [kept_by_stage(config, stage) for stage in stages]
    under_way = passes_under_way(config, dims, rank)
    # Chunks take turns in groups of as many microbatches as ranks, the first one first.
    groups, rest = divmod(under_way, dims.pipeline)
    total = dims.pipeline * sum(kept[index % len(kept)] for index in range(groups))
    total += rest * kept[groups % len(kept)]
    if config.parallel.schedule == "zero_bubble":
        put_off = min(rank, num_microbatches(config, dims))
        total += put_off * len(stages[0].layers) * deferred_by_layer(config)
    return total


def _pass_bytes(config: Config, stages: list[Stage], gpu_memory: float) -> int:
    """What the passes of a layer or of the head need at most, besides what they keep."""
    model, dtype = config.model, config.train.torch_dtype
    tokens = config.train.least_micro_batch_size * model.seq_length
    wide = max(3 * model.hidden_size, (1 + model.is_gated) * model.ffn_size)
    hidden = tokens * model.hidden_size * dtype.itemsize
    gradients = 2 * hidden + 2 * tokens * wide // config.parallel.tensor * dtype.itemsize
    most = recomputed_by_layer(config) + gradients
    if any(stage.last for stage in stages):
        logits = min(tokens * vocab_rows(config) * 4, int(_LOGIT_SHARE * gpu_memory))
        most = max(most, _LOGIT_COPIES * logits)
    return most


def _gathered(config: Config, stages: list[Stage]) -> int:
    """Weights and gradients that FSDP holds for a time: ZeRO 3 of two layers, ZeRO 2 of all."""
    if config.parallel.zero < 2:
        return 0
    own, main = config.train.torch_dtype.itemsize, main_dtype(config).itemsize
    layer = _size(layer_parameters(config))
    most = 0
    for stage in stages:
        rest = _size(edge_parameters(config, stage))
        layers = len(stage.layers) if config.parallel.zero == 2 else min(2, len(stage.layers))
        gradients = (rest + layer) * own + max(rest, layer) * main
        most = max(most, (rest + layers * layer) * own + gradients)
    return most


def _size(parameters: list[Alike]) -> int:
    return sum(one.count * one.size for one in parameters)
