"""All layouts of a run on a cluster that fit, the fastest first, by predicted time.

Varied are the sizes of the rank grid, micro-batch, ZeRO 0 or 1, sequence parallelism (without
symmetric memory), recomputation, and schedule with its chunks. Everything else stays as the config
has it. Tensor ranks stay inside a node, whose links alone keep up with the exchanges of a layer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

from megatron.config import Config, ParallelConfig, Recompute, ScheduleName
from megatron.config.rules import require
from megatron.errors import ConfigError
from megatron.planning.cluster import GIB, Cluster
from megatron.planning.count import Count, count_ranks
from megatron.planning.step_time import StepTime, require_16_bits, step_time
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


@dataclass(frozen=True)
class Candidate:
    """A layout that fits.

    Attributes:
        config: with that layout.
        count: what its ranks hold.
        time: of a step.
    """

    config: Config
    count: Count
    time: StepTime

    @property
    def dims(self) -> ParallelDims:
        return self.count.dims

    def is_layout_of(self, config: Config) -> bool:
        """Whether this is what ``config`` itself says."""
        parallel = replace(config.parallel, data=self.dims.data)
        train = (config.train.micro_batch_size, config.train.recompute)
        own = self.config.train
        return parallel == self.config.parallel and train == (own.micro_batch_size, own.recompute)


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
    require_16_bits(config)
    layouts = list(_layouts(config, cluster))
    require(
        bool(layouts),
        f"no layout of {cluster.gpus} GPUs takes this config: its batches must be multiples of the "
        f"data ranks, and give every stage a microbatch; the smallest has "
        f"{min(config.train.batch_sizes())} samples",
    )
    counts = list(_counts(layouts, cluster.memory))
    least = min(count.needed for count in counts)
    require(
        least <= cluster.memory,
        f"none of {len(layouts)} layouts of {cluster.gpus} GPUs fits in "
        f"{cluster.memory / GIB:.4g} GiB each; the least needs {least / GIB:.4g}",
    )
    candidates = [
        Candidate(count.config, count, step_time(count.config, count.dims, cluster))
        for count in counts
        if count.needed <= cluster.memory
    ]
    candidates.sort(key=lambda found: (found.time.total, found.count.needed))
    return Found(candidates, len(layouts) - len(candidates))


def _counts(layouts: Iterable[tuple[Config, ParallelDims]], gpu_memory: float) -> Iterator[Count]:
    """Of each layout, but for those of which a smaller micro-batch is too large already."""
    too_large: set[str] = set()
    for layout, dims in layouts:
        alike = f"{layout.parallel} {layout.train.recompute}"
        if alike not in too_large:
            found = count_ranks(layout, dims, gpu_memory)
            if found.needed > gpu_memory:
                too_large.add(alike)
            yield found


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
