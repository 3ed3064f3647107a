"""Two thousand runs that are stopped and go on with other options, by arithmetic.

Each has a random length, batch, ramp-up and blend, and goes on up to three times from where it is,
with another of each and with samples of another length. It reads all of its samples as a run does.
The tokens of its data are numbered, so that a ledger of what was read from each order can be kept:

    no step fails, and the steps are those that were foreseen at the start
    an order gives each of its tokens as often as it has epochs, and not once more
    a new order begins where the one before has nothing left but what does not fill a sample
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron.config import RampupConfig, TrainConfig
from megatron.data.blend import BlendedSamples
from megatron.data.history import Phase, continued_samples, go_on
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.loader import MicrobatchLoader, phases_of_each
from megatron.data.samples import GPTSamples, Piece, Samples
from megatron.optim.schedule import batch_plan, global_batch_size
from tests.figures import Figure
from tests.megatron.data.test_history import numbered

MOST_STARTS = 4
TOKENS = 2000
"""More than one of the datasets has."""
BLENDS = ([1.0], [0.5, 0.5], [0.9, 0.1], [0.2, 0.3, 0.5])
LENGTHS = (4, 6, 8, 16, 31)

Key = tuple[int, int, int, int]
"""An order: number of the dataset, and what ``new_order`` was asked for."""


@dataclass(frozen=True)
class Start:
    """The options of one start, and the step after which it is stopped."""

    train: TrainConfig
    seq_length: int
    stop: int | None


Ledger = dict[Key, NDArray[np.int64]]
"""How often each token was read from each order, in the sequence in which the orders were begun."""


class Recorded(Samples):
    """Enters what is read of ``samples`` under the order that it comes from."""

    def __init__(self, samples: Samples, last: list[Key], ledger: Ledger, total: int) -> None:
        self._samples, self._last, self._ledger, self._total = samples, last, ledger, total

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        sample = self._samples[index]
        counts = self._ledger.setdefault(self._last[-1], np.zeros(self._total, np.int64))
        np.add.at(counts, sample[:-1], 1)
        return sample


class Order(GPTSamples):
    """Tells which order was read from last."""

    def __init__(self, last: list[Key], key: Key, dataset: IndexedDataset) -> None:
        super().__init__(dataset, *key[1:])
        self._last, self._key = last, key

    def stretch(self, start: int, length: int) -> Iterator[Piece]:
        self._last[:] = [self._key]
        return super().stretch(start, length)


def build(
    datasets: list[IndexedDataset], weights: list[float], phases: list[Phase], ledger: Ledger
) -> Samples:
    """As ``build_samples`` does, and what is read is entered in the ledger."""
    last: list[Key] = []

    def one(number: int, own: list[Phase]) -> Samples:
        return continued_samples(
            own, 7, lambda *asked: Order(last, (number, *asked), datasets[number])
        )

    samples = one(0, phases)
    if len(weights) > 1:
        own = phases_of_each(phases, weights)
        parts = [one(number, its) for number, its in enumerate(own)]
        samples = BlendedSamples(parts, weights, max(phase.num_samples for phase in phases))
    return Recorded(samples, last, ledger, TOKENS * len(datasets))


def random_starts(choose: random.Random) -> Iterator[Start]:
    total = choose.randint(20, 150)
    seq_length = choose.choice(LENGTHS)
    for _ in range(choose.randint(2, MOST_STARTS)):
        batch = choose.randint(1, 14)
        rampup = RampupConfig()
        if batch > 2 and choose.random() < 0.4:
            increment = choose.choice([i for i in range(1, batch) if (batch - 1) % i == 0])
            rampup = RampupConfig(start=1, increment=increment, samples=choose.randint(1, total))
        yield Start(
            TrainConfig(samples=total, global_batch_size=batch, rampup=rampup),
            seq_length,
            choose.choice([None, choose.randint(1, 12)]),
        )
        if choose.random() < 0.6:
            total = choose.randint(20, 250)
        if choose.random() < 0.4:
            seq_length = choose.choice(LENGTHS)


def run(case: int, datasets: list[IndexedDataset]) -> None:
    choose = random.Random(case)
    weights = choose.choice(BLENDS)
    ledger: Ledger = {}
    phases: list[Phase] = []
    step = consumed = 0
    for start in random_starts(choose):
        phases = go_on(phases, consumed, start.seq_length, start.train.samples)
        samples = build(datasets, weights, phases, ledger)
        loader = MicrobatchLoader(samples, 0, 1)
        foreseen = step + sum(1 for _ in batch_plan(start.train, consumed))
        stop = None if start.stop is None else step + start.stop
        while step != stop:
            batch = global_batch_size(consumed, start.train)
            if consumed + batch > start.train.samples:
                assert step == foreseen
                break
            (microbatch,) = loader.read(consumed, batch, batch)
            assert microbatch["tokens"].shape == (batch, start.seq_length + 1)
            step, consumed = step + 1, consumed + batch
            assert consumed <= start.train.samples
    check(ledger, datasets)


def check(ledger: Ledger, datasets: list[IndexedDataset]) -> None:
    begun: defaultdict[int, list[Key]] = defaultdict(list)
    for key, counts in ledger.items():
        begun[key[0]].append(key)
        assert counts.max() <= epochs(key, datasets)
    for number, keys in begun.items():
        tokens = int(datasets[number].sizes.sum())
        for key in keys[:-1]:
            left = epochs(key, datasets) * tokens - ledger[key].sum()
            # Each time that the rest is cut anew, less than a sample is left over.
            assert left <= MOST_STARTS * max(LENGTHS), (key, left)


def epochs(key: Key, datasets: list[IndexedDataset]) -> int:
    number, count, seq_length, _ = key
    return max(1, -(-(count * seq_length + 1) // int(datasets[number].sizes.sum())))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[IndexedDataset]:
    folder = tmp_path_factory.mktemp("numbered")
    sizes = np.random.default_rng(1)
    return [
        numbered(folder / name, sizes.integers(0, 60, count).tolist(), first)
        for name, count, first in (("a", 40, 0), ("b", 12, TOKENS), ("c", 25, 2 * TOKENS))
    ]


@pytest.mark.parametrize("cases", [200, pytest.param(2000, marks=pytest.mark.nightly)])
def test_no_run_that_goes_on_with_other_options_fails_or_reads_a_token_too_often(
    datasets: list[IndexedDataset], cases: int, figure: Figure
) -> None:
    for case in range(cases):
        run(case, datasets)
    figure("changed resumes, by arithmetic", cases=cases, failed=0)


def test_the_ledger_finds_a_run_whose_order_is_made_anew(datasets: list[IndexedDataset]) -> None:
    ledger: Ledger = {}
    first = build(datasets, [1.0], [Phase(0, 16, 40)], ledger)
    other = build(datasets, [1.0], [Phase(0, 16, 400)], ledger)
    for samples, numbers in ((first, range(20)), (other, range(20, 40))):
        for at in numbers:
            samples[at]
    with pytest.raises(AssertionError):
        check(ledger, datasets)
