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
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.samples import Samples

_MOST_RUNS = 2048


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
    """

    def __init__(
        self, datasets: Sequence[Samples], weights: Sequence[float], num_samples: int
    ) -> None:
        self._datasets = datasets
        self._dataset_index, self._sample_index = blend(weights, num_samples)

    def __len__(self) -> int:
        return len(self._dataset_index)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self._datasets[self._dataset_index[index]][int(self._sample_index[index])]


def samples_of_each(weights: Sequence[float], num_samples: int) -> list[int]:
    """Samples that a blend of ``num_samples`` may need of each dataset: its share and 0.5 %.

    ``weights`` have the sum 1.
    """
    return [math.ceil(num_samples * weight * 1.005) for weight in weights]


def taken_of_each(weights: Sequence[float], num_samples: int) -> list[int]:
    """How many of its first ``num_samples`` a blend takes of each dataset."""
    datasets, _ = blend(weights, num_samples)
    counts: list[int] = np.bincount(datasets, minlength=len(weights)).tolist()
    return counts


def blend(
    weights: Sequence[float], num_samples: int
) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.unsignedinteger[Any]]]:
    """The dataset of each position of the blend, and the number of the sample in that dataset.

    Both ``(num_samples,)``, of the smallest unsigned dtypes that hold them.
    """
    shares = np.array(weights, dtype=np.float64)
    shares /= shares.sum()
    length = max(1, math.isqrt(num_samples), -(-num_samples // _MOST_RUNS))
    starts = np.arange(0, max(1, num_samples), length)
    choices = np.empty((length, len(starts)), np.min_scalar_type(len(shares)))
    taken = np.empty((length, len(starts)), np.min_scalar_type(num_samples))

    counts = _guess_counts(shares, starts)
    ends = np.empty_like(counts)
    runs = np.arange(len(starts))
    while len(runs) > 0:
        first, reached, rows = starts[runs], counts[runs], np.arange(len(runs))
        for step in range(length):
            behind = shares * np.maximum(first + step, 1)[:, None] - reached
            choice = behind.argmax(axis=1)
            choices[step, runs] = choice
            taken[step, runs] = reached[rows, choice]
            reached[rows, choice] += 1
        ends[runs] = reached
        # The first run begins from nothing, so each pass puts right at least one run more.
        runs = 1 + np.flatnonzero((ends[:-1] != counts[1:]).any(axis=1))
        counts[runs] = ends[runs - 1]
    return choices.T.reshape(-1)[:num_samples], taken.T.reshape(-1)[:num_samples]


def _guess_counts(shares: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts with which a blend may reach each of ``starts``: ``(starts, datasets)``.

    Whole numbers near the shares, of the right sum: rounded down, and one more for the datasets
    that lost most by it.
    """
    exact = starts[:, None] * shares
    counts = np.floor(exact).astype(np.int64)
    missing = starts - counts.sum(axis=1)
    losses = np.argsort(np.argsort(counts - exact, axis=1, kind="stable"), axis=1)
    return counts + (losses < missing[:, None])
