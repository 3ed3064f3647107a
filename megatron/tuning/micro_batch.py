"""How many samples a rank computes at a time.

    train.micro_batch_size       size
    a number                     that one
    auto, going on from a save   that of the save, if layout and kind of device are the same
    auto                         the one with the most samples a second that fits into memory

A larger microbatch makes larger matrix products, and needs more memory for its activations. Another
size adds gradients up in another order, whose last bits differ; so a run that goes on keeps it.

The candidates are the powers of two that fit the batches of the run and its ranks, and the largest
number that does. They are tried one after another, the smallest first, on the engine of the run
with its first samples: forward and backward without an update, once to warm up and twice by the
clock, of which the shorter counts. A pipeline gets as many microbatches as it has stages, and its
idle time is reckoned as in a whole step. The time is that of the slowest rank.

A candidate that would not fit is not tried: a rank that ran out of memory inside a collective would
leave the others waiting there. What it needs is known before, because activations grow with the
samples that are under way:

    peak(next) = held before + (peak(last) - held before) * samples(next) / samples(last)

has to be within 90 % of the memory of every rank. What is needed once, whatever the size, counts as
activations here, which errs on the safe side; what a process has freed and not given back counts as
held before, and the tenth is left for that. The search ends at the first candidate that would not
fit, or after one that takes more than 5 % longer a sample than the best.
"""

import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch.distributed import ProcessGroup

from megatron.config import Config
from megatron.engine.base import Engine
from megatron.engine.schedules import ideal_idle_share
from megatron.launch import Launch
from megatron.model.inputs import ModelInputs
from megatron.together import run_together
from megatron.tuning.attention import Timer, time_on_gpu
from megatron.tuning.memory import available_bytes, forget_peak, held_bytes, peak_bytes
from mpu import ParallelDims

ReadBatches: TypeAlias = Callable[[int, int, int], Iterator[ModelInputs]]
"""``BatchReader.read``: consumed samples, batch size and micro-batch size to microbatches."""

logger = logging.getLogger(__name__)

_USABLE = 0.9
_SLOWER = 1.05
_ROUNDS = 2


@dataclass(frozen=True)
class MicroBatchChoice:
    """A size, and the kind of device and the layout that it was chosen for."""

    size: int
    device: str
    dims: ParallelDims

    def to_state(self) -> dict[str, Any]:
        """What a save keeps of it."""
        return {"micro_batch": {"size": self.size, "device": self.device, **vars(self.dims)}}

    def is_in(self, saved: Mapping[str, Any]) -> bool:
        """Whether the state of a save keeps this choice."""
        return bool(saved.get("micro_batch") == self.to_state()["micro_batch"])


@dataclass(frozen=True)
class Cost:
    """What a trial cost one rank.

    Attributes:
        milliseconds: of a step, for each sample of the rank.
        held: bytes before the first trial.
        peak: most bytes.
        room: bytes that the rank may hold.
    """

    milliseconds: float
    held: int
    peak: int
    room: int

    def need(self, growth: float) -> float:
        """Bytes with ``growth`` times as many samples under way."""
        return self.held + (self.peak - self.held) * growth


Trial: TypeAlias = Callable[[int], Cost]
"""Tries a size on this rank; collective."""


def choose_micro_batch(
    config: Config,
    launch: Launch,
    saved: Mapping[str, Any],
    make_trial: Callable[[], Trial],
    *,
    group: ProcessGroup | None,
) -> MicroBatchChoice:
    """The micro-batch size of a run. Collective: all ranks of ``group`` get the same.

    Args:
        saved: the state of the save that the run goes on from; empty at a fresh start.
        make_trial: called where sizes have to be tried; collective.
    """
    named, dims = config.train.micro_batch_size, launch.groups.dims
    choice = partial(MicroBatchChoice, device=launch.device.type, dims=dims)
    if named != "auto":
        return choice(named)
    sizes = config.micro_batch_sizes(launch.world_size)
    kept = [size for size in sizes if choice(size).is_in(saved)]
    if kept:
        size, reason = kept[0], "as at the save"
    elif len(sizes) == 1:
        size, reason = sizes[0], "the only one that fits the batches"
    else:
        size, reason = _fastest(config, dims.data, sizes, make_trial(), group)
    logger.info("micro-batch size %d: %s", size, reason)
    return choice(size)


class EngineTrial:
    """Tries sizes on the engine of the run. Collective, from its making on.

    Args:
        read: gives training samples.
        first: the sample to begin with.
        timer: measures on the device; default: CUDA events on a GPU, and on a CPU the clock.
    """

    def __init__(
        self,
        config: Config,
        launch: Launch,
        engine: Engine,
        read: ReadBatches,
        *,
        group: ProcessGroup | None,
        first: int = 0,
        timer: Timer | None = None,
    ) -> None:
        self._config = config
        self._first = first
        self._data_size = launch.groups.dims.data
        self._device = launch.device
        self._engine = engine
        self._read = read
        self._timer = timer or (time_on_gpu if launch.device.type == "cuda" else _time_on_cpu)
        ranks = run_together(platform.node, group).count(platform.node())
        forget_peak(self._device)
        self._held = held_bytes(self._device)
        self._room = int(_USABLE * available_bytes(self._device, ranks))

    def __call__(self, size: int) -> Cost:
        (microbatch,) = self._read(self._first, size * self._data_size, size)
        in_trial = _samples_in_trial(self._config, self._data_size, size) // size
        trial = partial(self._engine.trial, [microbatch] * in_trial)
        trial()
        milliseconds = min(self._timer(trial) for _ in range(_ROUNDS))
        peak = peak_bytes(self._device)
        forget_peak(self._device)
        in_step = self._config.train.global_batch_size // self._data_size // size
        growth = _time(self._config, in_step) / _time(self._config, in_trial)
        return Cost(milliseconds * growth / (in_step * size), self._held, peak, self._room)


def _time(config: Config, microbatches: int) -> float:
    """Of a step, in that of one microbatch: with what the ranks of a pipeline are idle."""
    parallel = config.parallel
    return microbatches / (
        1 - ideal_idle_share(parallel.schedule, parallel.pipeline, parallel.chunks, microbatches)
    )


def _samples_in_trial(config: Config, data_size: int, size: int) -> int:
    """Samples of a trial: a microbatch for each stage of the pipeline, if a step has so many."""
    in_step = config.train.global_batch_size // data_size // size
    return size * min(in_step, config.parallel.num_stages)


def _time_on_cpu(action: Callable[[], None]) -> float:
    """Milliseconds by the clock, which runs while a rank waits for others too."""
    started = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - started)


@dataclass(frozen=True)
class _Tried:
    """A size that was tried, and what that cost the ranks."""

    size: int
    costs: list[Cost]

    @property
    def milliseconds(self) -> float:
        """Of the slowest rank."""
        return max(cost.milliseconds for cost in self.costs)

    def need(self, growth: float) -> tuple[float, float]:
        """Bytes that ``growth`` times the samples need, and the room for them, where scarcest."""
        needs = [(cost.need(growth), cost.room) for cost in self.costs]
        return max(needs, key=lambda need: need[0] / need[1])

    def __str__(self) -> str:
        peak = max(cost.peak for cost in self.costs)
        return f"{self.size} ({self.milliseconds:.3g} ms a sample, {_gib(peak)})"


def _fastest(
    config: Config, data_size: int, sizes: list[int], trial: Trial, group: ProcessGroup | None
) -> tuple[int, str]:
    """The size, and why: what was measured."""
    samples = partial(_samples_in_trial, config, data_size)
    tried, end = _search(sizes, samples, trial, group)
    best = min(tried, key=lambda one: one.milliseconds)
    return best.size, f"the fastest of {', '.join(map(str, tried))}{end}"


def _search(
    sizes: list[int], samples: Callable[[int], int], trial: Trial, group: ProcessGroup | None
) -> tuple[list[_Tried], str]:
    """What was tried, and which size would have been too large."""
    tried: list[_Tried] = []
    for size in sizes:
        if tried:
            need, room = tried[-1].need(samples(size) / samples(tried[-1].size))
            if need > room:
                return tried, f"; {size} would need {_gib(need)} of {_gib(room)}"
        tried.append(_Tried(size, run_together(partial(trial, size), group)))
        if tried[-1].milliseconds > _SLOWER * min(one.milliseconds for one in tried):
            break
    return tried, ""


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g} GiB"
