"""What a run will take, before there are GPUs, peers or data: parameters, memory, idle time.

The engine of one rank of each pipeline stage is built as in the run, among peers that do not exist
(torch's fake process group) and on the meta device, whose tensors have shapes and no values. What
it holds is then counted, not estimated:

    state          the storages of weights, gradients and optimizer
    activations    one microbatch, sent through the stage and back; the plan of the pipeline says
                   how many are held at once
    working        what is there for moments: temporary results, hidden states that arrive from
                   other stages, weights that are gathered under parallel.zero

Counted is the first rank of each stage. The others hold as much, or less where something does not
divide evenly. What CUDA and NCCL take for themselves comes on top. Options that need a device or a
package are left out (``train.fp8``, ``parallel.symmetric_memory``, apex); what they change of the
memory is small. What a measurement is to choose is counted as follows: the least micro-batch, and
attention that keeps no scores, if it can do the work.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.distributed as dist
from torch import nn

from megatron.config import Backend, Config, EngineConfig
from megatron.engine.schedules import Plan, plan_training
from megatron.engine.torch_engine import StateBytes, TorchEngine
from megatron.errors import ConfigError
from megatron.model.language_model import BloomForPretraining
from megatron.model.stages import Stage
from megatron.planning.communication import num_microbatches
from megatron.training.live_bytes import LiveBytes
from megatron.training.pass_bytes import META, PassBytes, measure_passes, most_held
from megatron.tuning.attention import candidates
from mpu import ParallelDims, ParallelGroups, build_groups, shard_spec

GIB = 2**30


@dataclass(frozen=True)
class RankCount:
    """What the first rank of a place in the pipeline holds.

    Attributes:
        stages: those on this rank, in order.
        parameters: of these stages, on all tensor ranks together; a tied weight counts once.
        state: bytes that stay.
        activations: bytes kept for backward passes, at most.
        working: bytes of what is there for moments.
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
class DryRun:
    """What was counted.

    Attributes:
        microbatches: of a data rank in one step, when the batch has grown.
        plan: of that step.
        ranks: of the pipeline, the first one first.
    """

    config: Config
    dims: ParallelDims
    microbatches: int
    plan: Plan
    ranks: tuple[RankCount, ...]

    @property
    def parameters(self) -> int:
        """Logical parameters of the model."""
        return sum(rank.parameters for rank in self.ranks)

    def check_fits(self, memory: float) -> None:
        """Raise a ConfigError if a rank needs more than ``memory``, in GiB."""
        place, fullest = max(enumerate(self.ranks), key=lambda item: item[1].total)
        if fullest.total > memory * GIB:
            raise ConfigError(
                f"rank {place} of the pipeline (layers {fullest.layers}) needs {fullest.total:,} "
                f"bytes, which must not be above the {int(memory * GIB):,} of --dry_run {memory:g}",
                on_every_rank=True,
            )


def dry_run(config: Config) -> DryRun:
    """Count what ``config`` will take. Needs a process without a process group.

    The number of ranks is what the config says; ``parallel.data`` null counts as 1.

    Raises:
        ConfigError: if the parts of the config do not fit each other.
    """
    parallel = config.parallel
    dims = config.layout(parallel.tensor * parallel.pipeline * (parallel.data or 1))
    microbatches = num_microbatches(config, dims)
    plan = plan_training(parallel.schedule, parallel.pipeline, parallel.chunks, microbatches)
    counter = _Counter(config, dims, plan)
    ranks = tuple(counter.count(place) for place in range(dims.pipeline))
    return DryRun(config, dims, microbatches, plan, ranks)


class _Counter:
    """Counts rank after rank; what stages that are alike need is measured once."""

    def __init__(self, config: Config, dims: ParallelDims, plan: Plan) -> None:
        self._config = _without_devices(config)
        self._dims = dims
        self._plan = plan
        self._measured: dict[tuple[int, bool, bool], PassBytes] = {}

    def count(self, place: int) -> RankCount:
        """What the first rank at a place of the pipeline holds."""
        config = self._config
        with absent_peers(self._dims, place) as groups:
            engine = _build_engine(config, groups)
            state = engine.state_bytes()
            if config.parallel.zero >= 2:
                # FSDP computes with real tensors only. But for the weights that it gathers, what
                # passes need is the same without it.
                parallel = replace(config.parallel, zero=0)
                engine = _build_engine(replace(config, parallel=parallel), groups)
            passes = {
                place + index * self._dims.pipeline: self._passes(model)
                for index, model in enumerate(engine.models)
            }
            update = _update_bytes(engine)
        held, most = most_held(self._plan.tasks(place), passes)
        most += _received_bytes(config, engine.models) + _gathered_bytes(config, engine.models)
        return RankCount(
            stages=tuple(model.stage for model in engine.models),
            parameters=_count_parameters(engine.models),
            state=state,
            activations=held,
            working=max(most, update) - held,
        )

    def _passes(self, model: BloomForPretraining) -> PassBytes:
        stage = model.stage
        key = (len(stage.layers), stage.first, stage.last)
        if key not in self._measured:
            self._measured[key] = measure_passes(self._config, model)
        return self._measured[key]


def _without_devices(config: Config) -> Config:
    """The config without what only a device or an optional package can do."""
    return replace(
        config,
        engine=EngineConfig(),
        model=replace(config.model, layernorm="torch"),
        train=replace(config.train, fp8=False),
        parallel=replace(config.parallel, symmetric_memory=False),
        optimizer=replace(config.optimizer, name="adamw"),
    )


@contextmanager
def absent_peers(dims: ParallelDims, place: int) -> Iterator[ParallelGroups]:
    """The groups of the first rank at a place of the pipeline, whose collectives do nothing."""
    # The import makes the backend known, which a run has no use for.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group(
        "fake",
        store=FakeStore(),
        rank=place * dims.data * dims.tensor,
        world_size=dims.world_size,
    )
    try:
        yield build_groups(dims)
    finally:
        dist.destroy_process_group()


def _build_engine(config: Config, groups: ParallelGroups) -> TorchEngine:
    return TorchEngine(config, groups, META, _backend(config))


def _backend(config: Config) -> Backend:
    """The attention backend that keeps what that of the run keeps."""
    named = config.model.attention_backend
    if named in ("explicit", "blocked"):
        return named
    device = torch.device("cpu" if config.launch.device == "cpu" else "cuda")
    able = candidates(config, device) if named == "auto" else ["sdpa"]
    return "sdpa" if "sdpa" in able else "blocked"


def _count_parameters(models: Sequence[BloomForPretraining]) -> int:
    specs = [shard_spec(parameter) for model in models for parameter in model.parameters()]
    return sum(prod(spec.shape) for spec in specs if not spec.tied_copy)


def _update_bytes(engine: TorchEngine) -> int:
    """What it takes to bring updated weights to all data ranks."""
    weights = [parameter for model in engine.models for parameter in model.parameters()]
    state = [box.tensor for entry in engine.state() for box in entry.boxes]
    with LiveBytes(besides=[*weights, *state]) as live:
        engine.load_state(lambda _: None, engine.scalars())
    return live.peak


def _received_bytes(config: Config, models: Sequence[BloomForPretraining]) -> int:
    """What arrives while a pass runs: the next hidden states, and gradients of others."""
    hidden = models[0].new_hidden(config.train.least_micro_batch_size, config.model.seq_length)
    from_before = any(not model.stage.first for model in models)
    from_after = any(not model.stage.last for model in models)
    return (from_before + from_after) * hidden.nbytes


def _gathered_bytes(config: Config, models: Sequence[BloomForPretraining]) -> int:
    """Weights and gradients that FSDP gathers for the time of a pass.

    Its units are the layers, and what is left of a stage. Stage 2 gathers all weights of a stage,
    stage 3 those of what is left, of the layer in use and of the next. Gradients wait for the end
    of their unit, and are then copied in the precision that they are summed up in.
    """
    zero, dtype = config.parallel.zero, config.train.torch_dtype
    if zero < 2:
        return 0
    wide = torch.promote_types(dtype, torch.float32)
    most = 0
    for model in models:
        whole = _size(model)
        layer = max(map(_size, model.language_model.transformer.layers.values()))
        rest = whole - sum(map(_size, model.language_model.transformer.layers.values()))
        weights = whole if zero == 2 else min(whole, rest + 2 * layer)
        gradients = (rest + layer) * dtype.itemsize + max(rest, layer) * wide.itemsize
        most = max(most, weights * dtype.itemsize + gradients)
    return most


def _layers(stage: Stage) -> str:
    first, last = stage.layers[0], stage.layers[-1]
    layers = f"{first}-{last}" if first != last else f"{first}"
    return f"{'E ' if stage.first else ''}{layers}{' H' if stage.last else ''}"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
