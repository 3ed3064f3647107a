"""What each rank of a run holds, counted before there are GPUs, peers or data.

    state          weights, gradients and optimizer, as ``megatron/optim`` keeps them
    activations    what the passes of one microbatch keep (``pass_bytes.py``), for as many as the
                   schedule has under way at once
    working        what is there for a time: temporary results, hidden states that arrive from other
                   stages, weights that are gathered under parallel.zero

This is the one answer to what a layout needs: ``pretrain_bloom.py --dry_run`` prints it, and the
search for the best layout decides by it. Counted is the first rank of each stage. The others hold
as much, or less where something does not divide evenly. What is not counted, but has to fit beside
it, is ``allowance``.

Options that need a device or a package are left out (``train.fp8``, ``parallel.symmetric_memory``,
apex); what they change of the memory is small. What a measurement is to choose is counted as
follows: the least micro-batch, and attention that keeps no scores, if it can do the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron.config import Backend, Config
from megatron.errors import ConfigError
from megatron.model.attention import candidates
from megatron.model.stages import Stage
from megatron.optim.adamw import MOMENTS
from megatron.planning.communication import num_microbatches
from megatron.planning.parameters import (
    Alike,
    edge_parameters,
    flat_buffer,
    layer_parameters,
    main_dtype,
    parameters_of,
    stages_of,
)
from megatron.planning.pass_bytes import PassShape, most_held, stage_bytes
from mpu import ParallelDims

GIB = 2**30

USUAL_GPU_MEMORY = 80 * GIB
"""Bytes of a GPU, where nobody says how many."""

_CUDA_AND_NCCL = 4 * GIB


def allowance(config: Config) -> int:
    """Bytes of a device for what is not counted: CUDA, NCCL and the gaps between tensors."""
    return 0 if config.launch.device == "cpu" else _CUDA_AND_NCCL


@dataclass(frozen=True)
class StateBytes:
    """Bytes that a rank holds between steps.

    Attributes:
        weights: what the model computes with.
        gradients: what the gradients of a step are added up in.
        optimizer: moments, and main weights where they are kept apart.
    """

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class RankCount:
    """What the first rank of a place in the pipeline holds.

    Attributes:
        stages: those on this rank, in order.
        parameters: of these stages, on all tensor ranks together; a tied weight counts once.
        state: bytes that stay.
        activations: bytes kept for backward passes, at most.
        working: bytes of what is there for a time.
    """

    stages: tuple[Stage, ...]
    parameters: int
    state: StateBytes
    activations: int
    working: int

    @property
    def layers(self) -> str:
        """Its layers, with E for the embedding and H for the head."""
        return ", ".join(map(_layers, self.stages))

    @property
    def total(self) -> int:
        return self.state.total + self.activations + self.working


@dataclass(frozen=True)
class Count:
    """What a run needs.

    Attributes:
        microbatches: of a data rank in one step, when the batch has grown.
        ranks: of the pipeline, the first one first.
    """

    config: Config
    dims: ParallelDims
    microbatches: int
    ranks: tuple[RankCount, ...]

    @property
    def parameters(self) -> int:
        """Logical parameters of the model."""
        return sum(rank.parameters for rank in self.ranks)

    @property
    def fullest(self) -> RankCount:
        """The rank that needs the most."""
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def needed(self) -> int:
        """Bytes of a device that is enough for every rank, allowance included."""
        return self.fullest.total + allowance(self.config)

    def check_fits(self, memory: float) -> None:
        """Raise a ConfigError if a rank needs more than ``memory``, in GiB."""
        if self.needed > memory * GIB:
            beside = allowance(self.config)
            also = f" and {beside / GIB:g} GiB beside them," if beside else ""
            raise ConfigError(
                f"rank {self.ranks.index(self.fullest)} of the pipeline (layers "
                f"{self.fullest.layers}) needs {self.fullest.total:,} bytes,{also} "
                f"which must not be above the {int(memory * GIB):,} of --dry_run {memory:g}",
                on_every_rank=True,
            )


def count(config: Config, gpu_memory: float = USUAL_GPU_MEMORY) -> Count:
    """Count what ``config`` will take. Needs a process without a process group.

    The number of ranks is what the config says; ``parallel.data`` null counts as 1.

    Args:
        gpu_memory: bytes of a GPU, of which the head takes a share for its logits.

    Raises:
        ConfigError: if the parts of the config do not fit each other.
    """
    parallel = config.parallel
    dims = config.layout(parallel.tensor * parallel.pipeline * (parallel.data or 1))
    return count_ranks(config, dims, gpu_memory)


def count_ranks(config: Config, dims: ParallelDims, gpu_memory: float) -> Count:
    """The same on a rank grid that is known to suit ``config``."""
    shape = pass_shape(config, gpu_memory)
    ranks = tuple(_count_rank(config, dims, place, shape) for place in range(dims.pipeline))
    return Count(config, dims, num_microbatches(config, dims), ranks)


def counted_backend(config: Config) -> Backend:
    """The attention backend that keeps what that of the run keeps."""
    named = config.model.attention_backend
    if named in ("explicit", "blocked"):
        return named
    device = torch.device("cpu" if config.launch.device == "cpu" else "cuda")
    able = candidates(config, device) if named == "auto" else ["sdpa"]
    return "sdpa" if "sdpa" in able else "blocked"


def state_bytes(config: Config, dims: ParallelDims, pipeline_rank: int) -> StateBytes:
    """What a rank of that place in the pipeline holds between steps."""
    parameters = parameters_of(config, stages_of(config, pipeline_rank))
    own, main = config.train.torch_dtype.itemsize, main_dtype(config).itemsize
    if config.parallel.zero >= 2:
        part = main * sum(one.count * one.rows(dims.data) for one in parameters)
        return StateBytes(part, part, len(MOMENTS) * part)
    shards = _shards(config, dims)
    shard = flat_buffer(parameters).shard(shards)
    # In full precision the weights are the main parameters.
    kept_apart = 1 if own < main else 0
    optimizer = (len(MOMENTS) + kept_apart) * shard * main
    return StateBytes(shard * shards * own, shard * shards * main, optimizer)


def _count_rank(config: Config, dims: ParallelDims, place: int, shape: PassShape) -> RankCount:
    stages = stages_of(config, place)
    parameters = parameters_of(config, stages)
    state = state_bytes(config, dims, place)
    passes = [stage_bytes(shape, stage) for stage in stages]
    held, most = most_held(config.parallel, place, num_microbatches(config, dims), passes)
    # What arrives while a pass runs: the next hidden states, and gradients of others.
    arriving = any(not stage.first for stage in stages) + any(not stage.last for stage in stages)
    most += arriving * shape.hidden_bytes + _gathered_bytes(config, stages)
    # After the passes ZeRO 1 receives its part of the summed gradients beside the buffer.
    shards = _shards(config, dims)
    received = state.gradients // shards if shards > 1 else 0
    return RankCount(
        stages=tuple(stages),
        parameters=sum(one.count * one.logical for one in parameters),
        state=state,
        activations=held,
        working=max(most, received) - held,
    )


def _shards(config: Config, dims: ParallelDims) -> int:
    """Parts that ZeRO 1 cuts flat buffers into."""
    return dims.data if config.parallel.zero == 1 else 1


def pass_shape(config: Config, gpu_memory: float = USUAL_GPU_MEMORY) -> PassShape:
    """What the memory of the passes of ``config`` depends on."""
    return PassShape(
        # Layer norms of apex need a package, and memory for the same.
        model=replace(config.model, layernorm="torch"),
        backend=counted_backend(config),
        dtype=config.train.torch_dtype,
        micro_batch=config.train.least_micro_batch_size,
        recompute=config.train.recompute,
        tensor=config.parallel.tensor,
        sequence=config.parallel.sequence,
        deferring=config.parallel.schedule == "zero_bubble",
        positions=config.data.reset_position_ids,
        documents=config.data.reset_attention_mask,
        gpu_memory=None if config.launch.device == "cpu" else gpu_memory,
    )


def _gathered_bytes(config: Config, stages: Sequence[Stage]) -> int:
    """Weights and gradients that FSDP gathers for the time of a pass.

    Its units are the layers, and what is left of a stage. Stage 2 gathers all weights of a stage,
    stage 3 those of what is left, of the layer in use and of the next. Gradients wait for the end
    of their unit, and are then copied in the precision that they are summed up in.
    """
    zero, own = config.parallel.zero, config.train.torch_dtype.itemsize
    if zero < 2:
        return 0
    most, layer = 0, _size(layer_parameters(config))
    for stage in stages:
        rest = _size(edge_parameters(config, stage))
        layers = len(stage.layers) if zero == 2 else min(2, len(stage.layers))
        gradients = (rest + layer) * own + max(rest, layer) * main_dtype(config).itemsize
        most = max(most, (rest + layers * layer) * own + gradients)
    return most


def _size(parameters: Sequence[Alike]) -> int:
    return sum(one.count * one.size for one in parameters)


def _layers(stage: Stage) -> str:
    first, last = stage.layers[0], stage.layers[-1]
    layers = f"{first}-{last}" if first != last else f"{first}"
    return f"{'E ' if stage.first else ''}{layers}{' H' if stage.last else ''}"
