"""Several datasets as one, in given shares, and one dataset cut into splits.

Position i of a blend takes the dataset that is furthest behind its share, and of that dataset the
next sample:

    k(i) = argmax_k  weight_k * max(i, 1) - count_k          (the first one if several are)

Each choice depends on all choices before it. A loop over millions of positions is too slow in
Python, so all positions are cut into runs, and the runs make their choices side by side, each from
a guess of the counts that it begins with. Then every run is compared with the one before it: where
that one ended with other counts than were guessed, the run is repeated from those. The counts stay
near ``weight_k * i`` and starts that differ soon meet, so that one or two repeats are the rule, and
the choices are those of the loop exactly.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.cache import ArrayCache, ArraySpec, cache_key
from megatron.data.samples import Piece, Samples

_MOST_RUNS = 16384
_COUNTS_AT_ONCE = 1 << 15
"""What one thread counts side by side, so that it stays in the processor's cache."""
_THREADS = 8


def split_documents(num_documents: int, shares: Sequence[float]) -> list[range]:
    """Cut the documents ``range(num_documents)`` into neighbouring ranges in the given shares.

    Lengths are rounded one by one; what they then have too much or too little in all is taken from
    the first range, or added to it.
    """
    total = sum(shares)
    lengths = [round(share / total * float(num_documents)) for share in shares]
    excess = sum(lengths) - num_documents
    bounds = [0, *(bound - excess for bound in accumulate(lengths))]
    return [range(start, stop) for start, stop in pairwise(bounds)]


class BlendedSamples:
    """Samples of several datasets in given shares.

    Args:
        datasets: what to blend; each must have a little more than its share, see
            ``samples_of_each``.
        weights: shares of the datasets, not necessarily of sum 1.
        num_samples: length of the blend.
        cache: what is known of kept blends already.
        cache_folder: where to keep the blend between runs; None keeps nothing.
    """

    def __init__(
        self,
        datasets: Sequence[Samples],
        weights: Sequence[float],
        num_samples: int,
        cache: ArrayCache | None = None,
        cache_folder: Path | None = None,
    ) -> None:
        self._datasets = datasets
        specs = _specs(len(weights), num_samples)
        arrays = (cache or ArrayCache()).get(
            cache_folder,
            f"blend-{cache_key(weights=list(weights), num_samples=num_samples)}",
            specs,
            lambda: dict(zip(specs, blend(weights, num_samples), strict=True)),
        )
        self._dataset_index = arrays["dataset_index"]
        self._sample_index = arrays["sample_index"]

    def __len__(self) -> int:
        return len(self._dataset_index)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self._datasets[self._dataset_index[index]][int(self._sample_index[index])]

    def pieces(self, index: int) -> Iterator[Piece]:
        return self._datasets[self._dataset_index[index]].pieces(int(self._sample_index[index]))


def samples_of_each(weights: Sequence[float], num_samples: int) -> list[int]:
    """Samples that a blend of ``num_samples`` may need of each dataset: its share and 0.5 %.

    ``weights`` have the sum 1.
    """
    return [math.ceil(num_samples * weight * 1.005) for weight in weights]


def taken_of_each(
    weights: Sequence[float],
    num_samples: int,
    cache: ArrayCache | None = None,
    cache_folder: Path | None = None,
) -> list[int]:
    """How many of its first ``num_samples`` a blend takes of each dataset; kept like a blend."""
    if num_samples == 0:
        return [0] * len(weights)
    arrays = (cache or ArrayCache()).get(
        cache_folder,
        f"taken-{cache_key(weights=list(weights), num_samples=num_samples)}",
        {"taken": ArraySpec((len(weights),), np.dtype(np.int64))},
        lambda: {"taken": np.bincount(blend(weights, num_samples)[0], minlength=len(weights))},
    )
    counts: list[int] = arrays["taken"].tolist()
    return counts


def _specs(num_datasets: int, num_samples: int) -> dict[str, ArraySpec]:
    """The two arrays of a blend, of the smallest unsigned dtypes that hold their numbers."""
    return {
        "dataset_index": ArraySpec((num_samples,), np.min_scalar_type(num_datasets)),
        "sample_index": ArraySpec((num_samples,), np.min_scalar_type(num_samples)),
    }


def blend(weights: Sequence[float], num_samples: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The dataset of each position of the blend, and the number of the sample in that dataset.

    Both ``(num_samples,)``, of the smallest unsigned dtypes that hold them.
    """
    shares = np.array(weights, dtype=np.float64)
    shares /= shares.sum()
    length = max(1, math.isqrt(num_samples), -(-num_samples // _MOST_RUNS))
    starts = np.arange(0, max(1, num_samples), length)
    specs = _specs(len(shares), num_samples)
    choices, taken = (np.empty((len(starts), length), spec.dtype) for spec in specs.values())

    counts = _guess_counts(shares, starts)
    ends = np.empty_like(counts)
    runs = np.arange(len(starts))
    at_once = max(1, _COUNTS_AT_ONCE // len(shares))

    def choose(some: NDArray[np.int64]) -> None:
        chosen = [np.empty((length, len(some)), spec.dtype) for spec in specs.values()]
        ends[some] = _choose(shares, starts[some], counts[some], *chosen)
        choices[some], taken[some] = (numbers.T for numbers in chosen)

    with ThreadPoolExecutor(_THREADS) as pool:
        while len(runs) > 0:
            list(pool.map(choose, np.split(runs, range(at_once, len(runs), at_once))))
            # The first run begins from nothing, so each pass puts right at least one run more.
            runs = 1 + np.flatnonzero((ends[:-1] != counts[1:]).any(axis=1))
            counts[runs] = ends[runs - 1]
    return choices.reshape(-1)[:num_samples], taken.reshape(-1)[:num_samples]


def _choose(
    shares: NDArray[np.float64],
    starts: NDArray[np.int64],
    counts: NDArray[np.float64],
    choices: NDArray[Any],
    taken: NDArray[Any],
) -> NDArray[np.float64]:
    """Make the choices of some runs from the counts that they begin with, ``(runs, datasets)``.

    Fills in the dataset of each position and the number of the sample in it, both
    ``(positions, runs)``, and returns the counts that the runs end with.
    """
    # Counts are whole numbers below 2**53, which float64 holds exactly.
    reached = counts.reshape(-1)
    behind = np.empty_like(counts)
    rows = np.arange(len(starts)) * len(shares)
    for step in range(len(choices)):
        np.multiply(np.maximum(starts + step, 1)[:, None], shares, out=behind)
        np.subtract(behind, counts, out=behind)
        choice = behind.argmax(axis=1)
        choices[step] = choice
        place = rows + choice
        before = reached[place]
        taken[step] = before
        reached[place] = before + 1.0
    return counts


def _guess_counts(shares: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Counts with which a blend may reach each of ``starts``: ``(starts, datasets)``.

    Whole numbers near the shares, of the right sum: rounded down, and one more for the datasets
    that lost most by it.
    """
    exact = starts[:, None] * shares
    counts = np.floor(exact)
    missing = starts - counts.sum(axis=1)
    losses = np.argsort(np.argsort(counts - exact, axis=1, kind="stable"), axis=1)
    return counts + (losses < missing[:, None])
