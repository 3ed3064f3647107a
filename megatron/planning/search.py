"""All layouts of a run on a cluster that fit, the fastest first, by predicted time.

Varied are the sizes of the rank grid, micro-batch, ZeRO 0 or 1, sequence parallelism (without
symmetric memory), recomputation, and schedule with its chunks. Everything else stays as the config
has it. Tensor ranks stay inside a node, whose links alone keep up with the exchanges of a layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

from megatron.config import Config, ParallelConfig, Recompute, ScheduleName
from megatron.config.rules import require
from megatron.errors import ConfigError
from megatron.planning.cluster import GIB, Cluster
from megatron.planning.memory import Memory, fullest_rank
from megatron.planning.step_time import StepTime, step_time
from mpu import ParallelDims

_MICRO_BATCHES = (1, 2, 4, 8, 16)
_SCHEDULES: tuple[tuple[ScheduleName, int], ...] = (
    ("1f1b", 1),
    ("interleaved_1f1b", 2),
    ("interleaved_1f1b", 3),
    ("interleaved_1f1b", 4),
    ("zero_bubble", 1),
)
"""With the chunks of each rank."""

RESERVED = 4 * GIB
"""Bytes of a GPU that CUDA, NCCL and the gaps between tensors take."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits.

    Attributes:
        config: with that layout.
        dims: of the rank grid.
        memory: of the fullest rank.
        time: of a step.
    """

    config: Config
    dims: ParallelDims
    memory: Memory
    time: StepTime

    def is_layout_of(self, config: Config) -> bool:
        """Whether this is what ``config`` itself says."""
        parallel = replace(config.parallel, data=self.dims.data)
        train = (config.train.micro_batch_size, config.train.recompute)
        own = self.config.train
        return parallel == self.config.parallel and train == (own.micro_batch_size, own.recompute)

    @property
    def tokens_per_second(self) -> float:
        """Of each GPU."""
        tokens = self.config.train.global_batch_size * self.config.model.seq_length
        return tokens / self.time.total / self.dims.world_size


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        candidates: those that fit, the fastest first; of equal ones, that with the least memory.
        num_too_large: layouts that the config accepts and that do not fit.
    """

    candidates: list[Candidate]
    num_too_large: int


def search(config: Config, cluster: Cluster) -> Found:
    """Try all layouts.

    Raises:
        ConfigError: if the config takes none on as many GPUs, or none fits.
    """
    require(
        config.train.torch_dtype.itemsize == 2,
        f"train.dtype must be bf16 or fp16 to plan, got {config.train.dtype}",
    )
    layouts = list(_layouts(config, cluster))
    require(
        bool(layouts),
        f"no layout of {cluster.gpus} GPUs takes this config: its batches must be multiples of the "
        f"data ranks, and give every stage a microbatch; the smallest has "
        f"{min(config.train.batch_sizes())} samples",
    )
    sized = [(layout, dims, fullest_rank(layout, dims, cluster.memory)) for layout, dims in layouts]
    least = min(memory.total for *_, memory in sized) + RESERVED
    require(
        least <= cluster.memory,
        f"none of {len(layouts)} layouts of {cluster.gpus} GPUs fits in "
        f"{cluster.memory / GIB:.4g} GiB each; the least needs {least / GIB:.4g}",
    )
    candidates = [
        Candidate(layout, dims, memory, step_time(layout, dims, cluster))
        for layout, dims, memory in sized
        if memory.total + RESERVED <= cluster.memory
    ]
    candidates.sort(key=lambda found: (found.time.total, found.memory.total))
    return Found(candidates, len(layouts) - len(candidates))


def _layouts(config: Config, cluster: Cluster) -> Iterator[tuple[Config, ParallelDims]]:
    """What the rules of the config accept."""
    for tensor in _divisors(min(cluster.gpus_per_node, cluster.gpus)):
        for pipeline in _divisors(cluster.gpus // tensor):
            if cluster.gpus % (tensor * pipeline) == 0 and pipeline <= config.model.num_layers:
                yield from _layouts_on(config, cluster.gpus, tensor, pipeline)


def _layouts_on(
    config: Config, gpus: int, tensor: int, pipeline: int
) -> Iterator[tuple[Config, ParallelDims]]:
    """Those of a rank grid."""
    data = gpus // (tensor * pipeline)
    zeros: tuple[Literal[0, 1], ...] = (0, 1) if data > 1 else (0,)
    sequences = (False, True) if tensor > 1 else (False,)
    schedules = _SCHEDULES if pipeline > 1 else _SCHEDULES[:1]
    choices = product(_MICRO_BATCHES, schedules, zeros, sequences, get_args(Recompute))
    for micro_batch, (schedule, chunks), zero, sequence, recompute in choices:
        train = replace(config.train, micro_batch_size=micro_batch, recompute=recompute)
        try:
            parallel = ParallelConfig(
                tensor=tensor,
                pipeline=pipeline,
                data=data,
                sequence=sequence,
                zero=zero,
                schedule=schedule,
                chunks=chunks,
                partition=config.parallel.partition,
            )
            layout = replace(config, train=train, parallel=parallel)
            yield layout, layout.layout(gpus)
        except ConfigError:
            continue


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
