"""A run that goes on with more, fewer or longer samples reads nothing twice before its time.

The data of these tests numbers its tokens, so that each token that a sample holds tells where it
lies. What a run has read is then compared with what its orders hold, token by token.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron.data.history import Phase, SamplesFrom, continued_samples, go_on
from megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron.data.samples import GPTSamples, Samples

SEED = 1234


def numbered(prefix: Path, sizes: list[int], first: int = 0) -> IndexedDataset:
    """Documents of these sizes, whose tokens are ``first``, ``first + 1``, ..."""
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for size in sizes:
            writer.add(range(first, first + size))
            writer.end_document()
            first += size
    return IndexedDataset(prefix)


@dataclass(frozen=True)
class Reading:
    """Reads ``dataset`` through phases."""

    dataset: IndexedDataset

    def samples(self, phases: list[Phase]) -> Samples:
        return continued_samples(
            phases,
            SEED,
            lambda count, length, seed: GPTSamples(self.dataset, count, length, seed),
        )


def inputs(samples: Samples, first: int, stop: int) -> list[int]:
    """The tokens of some samples, without those that are only predicted."""
    return [token for at in range(first, stop) for token in samples[at][:-1].tolist()]


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    sizes = np.random.default_rng(0).integers(0, 60, 40).tolist()
    return Reading(numbered(tmp_path / "text", sizes))


def test_more_samples_follow_those_of_the_first_order(reading: Reading) -> None:
    tokens = int(reading.dataset.sizes.sum())
    first = GPTSamples(reading.dataset, 20, 16, SEED)
    assert len(first) == (tokens - 1) // 16, "one epoch"
    phases = go_on([Phase(0, 16, 20)], 10, 16, 2 * len(first))
    samples = reading.samples(phases)
    assert [samples[i].tolist() for i in range(len(first))] == [s.tolist() for s in iterate(first)]
    assert max(Counter(inputs(samples, 0, len(first))).values()) == 1
    assert max(Counter(inputs(samples, 0, 2 * len(first))).values()) == 2


def iterate(samples: Samples) -> list[NDArray[Any]]:
    return [samples[at] for at in range(len(samples))]


def test_fewer_samples_are_the_first_of_the_order(reading: Reading) -> None:
    before = [Phase(0, 16, 1000)]
    assert go_on(before, 10, 16, 100) == before


@pytest.mark.parametrize("seq_length", [1, 5, 15, 17, 32, 48])
@pytest.mark.parametrize("consumed", [0, 1, 20, 55])
def test_samples_of_another_length_hold_what_is_left(
    reading: Reading, seq_length: int, consumed: int
) -> None:
    first = reading.samples([Phase(0, 16, 20)])
    phases = go_on([Phase(0, 16, 20)], consumed, seq_length, consumed + 1)
    samples = reading.samples(phases)
    read = inputs(first, 0, consumed)
    left = inputs(samples, consumed, len(samples))
    assert set(read).isdisjoint(left)
    assert len(set(left)) == len(left)
    # All but what does not fill a sample, along with the last token, which is only predicted.
    whole = (len(first) - consumed) * 16
    assert len(left) == (whole - 1) // seq_length * seq_length


def test_neighbours_stay_neighbours_where_nothing_between_them_was_read(reading: Reading) -> None:
    first = GPTSamples(reading.dataset, 20, 16, SEED)
    samples = reading.samples([Phase(0, 16, 20), Phase(1, 32, 2)])
    stream = inputs_along(first)
    place = {token: at for at, token in enumerate(stream)}
    torn = 0
    for at in range(1, len(samples)):
        places = [place[token] for token in samples[at].tolist() if token in place]
        torn += any(b - a != 1 for a, b in zip(places[:-1], places[1:], strict=True))
    assert torn <= 1, "one sample was read, so at most one is cut where it was"


def inputs_along(order: GPTSamples) -> list[int]:
    pieces = order.stretch(0, len(order) * order.seq_length)
    return [token for piece in pieces for token in piece.tokens().tolist()]


def test_the_length_may_change_more_than_once(reading: Reading) -> None:
    phases = [Phase(0, 16, 60)]
    read: list[int] = []
    for consumed, stop, seq_length in ((10, 20, 8), (20, 25, 24), (25, 26, 5)):
        read += inputs(reading.samples(phases), len_read(phases), consumed)
        phases = go_on(phases, consumed, seq_length, stop + 60)
    read += inputs(reading.samples(phases), 25, 85)
    # One epoch has 40 documents of 29 tokens or so, and that was read: 160 + 80 + 120 + 300.
    assert max(Counter(read).values()) == 1


def len_read(phases: list[Phase]) -> int:
    return phases[-1].first


def test_other_data_is_read_from_its_first_sample_on(reading: Reading) -> None:
    phases = go_on([Phase(0, 16, 60)], 10, 16, 30, same_data=False)
    assert phases == [Phase(10, 16, 30)]
    alone = reading.samples([Phase(0, 16, 20)])
    samples = SamplesFrom(10, alone)
    assert [samples[at].tolist() for at in (10, 29)] == [alone[at].tolist() for at in (0, 19)]
    assert list(samples.pieces(10)) == list(alone.pieces(0))
    with pytest.raises(IndexError, match="sample 9 is none of 10 to"):
        samples[9]
