"""Times and memory that can be trusted on a machine with other work on it.

    round    0            1 ... 6
             A B C        A B C  ...  A B C        ratio = least time of A / least time of B
             discarded    least time of each

Contenders take turns, so that whatever slows the machine slows all of them. On a CPU the clock is
that of the process, which stands still while another one runs; of several rounds the least counts,
because noise only adds. Where even the median is far above the least, nothing was measured.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeAlias

import torch

from megatron.errors import RunError

Work: TypeAlias = Callable[[], object]
Timer: TypeAlias = Callable[[Work], float]

MOST_SPREAD = 1.35
"""Median over least time, above which a measurement is refused."""

ROUNDS = 6

_RESET_PEAK = "5"
"""What Linux wants written to clear_refs to forget the peak of the resident size."""


class NoisyError(RunError):
    """Other work on the machine disturbed a measurement."""


@dataclass(frozen=True)
class Times:
    """Seconds of one contender in each round that counts."""

    seconds: tuple[float, ...]

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Median over least."""
        return self.median / self.least


def cpu_seconds(work: Work) -> float:
    """CPU time that this process needs for ``work``."""
    start = time.process_time()
    work()
    return time.process_time() - start


def wall_seconds(work: Work) -> float:
    """Time that passes during ``work``, which leaves nothing running."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def gpu_seconds(work: Work, repeats: int = 5) -> float:
    """Mean time of one call of ``work`` on the current GPU, by its events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def timer_of(device: torch.device) -> Timer:
    """How work on ``device`` is timed."""
    return gpu_seconds if device.type == "cuda" else cpu_seconds


def runnable(contenders: Mapping[str, Work]) -> dict[str, Work]:
    """Those that do not fail when called, as a compiler may that does not know the device."""
    able = {}
    for name, work in contenders.items():
        try:
            work()
        except RuntimeError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
        else:
            able[name] = work
    return able


def check_losses(losses: Mapping[str, float], want: float, tolerance: float) -> None:
    """Refuse contenders that do not compute the same.

    Args:
        tolerance: relative difference from the loss ``want``.

    Raises:
        RunError: naming the contender.
    """
    for name, loss in losses.items():
        if not math.isclose(loss, want, rel_tol=tolerance):
            raise RunError(
                f"loss of {name} is {loss}, not {want} within {tolerance:g}: not the same work"
            )


def interleave(
    contenders: Mapping[str, Work], timer: Timer, *, rounds: int = ROUNDS
) -> dict[str, Times]:
    """Time contenders in turns; a first round, in which caches fill, does not count."""
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, work in contenders.items():
            measured[name].append(timer(work))
    return {name: Times(tuple(seconds[1:])) for name, seconds in measured.items()}


def check_quiet(what: str, times: Mapping[str, Times], *, allow_noise: bool) -> None:
    """Refuse times of which one varies too much, unless ``allow_noise``.

    Raises:
        NoisyError: naming the contender.
    """
    for name, found in times.items():
        if found.spread > MOST_SPREAD and not allow_noise:
            raise NoisyError(
                f"{what}: the median time of {name} is {found.spread:.2f} times its least, above "
                f"{MOST_SPREAD}; measure again on a quiet machine, or use --noisy"
            )


def peak_bytes(work: Work, device: torch.device) -> int:
    """Most memory that ``work`` needs at once, on top of what is there before.

    On a CPU this is the resident size of the process, as Linux counts it, which a process of its
    own should measure: memory that was freed before may be reused without being counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """A size of this process, in bytes: ``VmRSS`` now, ``VmHWM`` at its peak since the reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RunError(f"/proc/self/status has no {name}, which memory is measured by")
