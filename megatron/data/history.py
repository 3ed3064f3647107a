"""Samples of a run that goes on in another way than it began: more of them, or of another length.

The order of samples follows from how many are needed and how long they are (``samples``). Made anew
for other numbers it would be another order from the first sample on: some of what has been read
would be read again, and some of what has not never. So a run keeps the order that it began with,
and remembers its phases, each of which goes on where the one before it ends:

    more samples      the order is read to its end, which is that of an epoch; for what is missing
                      then, a new order begins, with a seed of its own
    another length    what has not been read is laid end to end as it stands in the documents, cut
                      into samples of that length and shuffled; then a new order begins, as above
    other data        a new order begins, of all samples that are missing

Nothing is read twice before all of it has been read as often as the orders before have epochs.

    samples of 4, of which 0, 2 and 5 are read     [ 0  ][ 1  ][ 2  ][ 3  ][ 4  ][ 5  ][ 6  ]
    what is left, in samples of 8                        [ 1  ]      [ 3  ][ 4  ]      [ 6  ]
                                                         [    0        ][        1          ]
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron.data.samples import Piece, Samples, StreamSamples


@dataclass(frozen=True)
class Phase:
    """How a run reads from some point on.

    Attributes:
        first: samples that were read before.
        seq_length: tokens in a sample, without the one that is only predicted.
        num_samples: samples that the run needs in all, those before included.
    """

    first: int
    seq_length: int
    num_samples: int


def go_on(
    phases: Sequence[Phase],
    consumed: int,
    seq_length: int,
    num_samples: int,
    *,
    same_data: bool = True,
) -> list[Phase]:
    """The phases of a run that went through ``phases`` and goes on after ``consumed`` samples.

    They begin with the first sample of the data that is read now: of ``same_data`` as before or,
    if that is false, of other data.
    """
    if not same_data:
        return [Phase(consumed, seq_length, num_samples)]
    same_length = bool(phases) and phases[-1].seq_length == seq_length
    if same_length and num_samples <= phases[-1].num_samples:
        return list(phases)
    return [*phases, Phase(consumed, seq_length, num_samples)]


class SamplesFrom:
    """Samples that are numbered from ``first`` on: those before it came from other data."""

    def __init__(self, first: int, samples: Samples) -> None:
        self._first = first
        self._samples = samples

    def __len__(self) -> int:
        return self._first + len(self._samples)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self._samples[self._own(index)]

    def pieces(self, index: int) -> Iterator[Piece]:
        return self._samples.pieces(self._own(index))

    def _own(self, index: int) -> int:
        if not self._first <= index < len(self):
            raise IndexError(f"sample {index} is none of {self._first} to {len(self) - 1}")
        return index - self._first


def continued_samples(
    phases: Sequence[Phase], seed: int, new_order: Callable[[int, int, int], StreamSamples]
) -> Samples:
    """The samples of one dataset through all ``phases`` of a run.

    Args:
        new_order: makes an order of at least so many samples, of that length and with that seed.
    """
    parts: list[_Part] = []
    for number, phase in enumerate(phases):
        phase_seed = (seed + number) % 2**32
        if parts and phase.seq_length != parts[-1].samples.seq_length:
            parts = _cut_anew(parts, phase, phase_seed)
        missing = phase.num_samples - sum(part.count for part in parts)
        if missing > 0 or not parts:
            order = new_order(missing, phase.seq_length, phase_seed)
            parts.append(_Part(order, len(order)))
    return parts[0].samples if len(parts) == 1 else _Chain(parts)


@dataclass(frozen=True)
class _Part:
    """The first ``count`` of some samples."""

    samples: StreamSamples
    count: int


class _Chain:
    """Parts one after another."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts
        self._ends = np.cumsum([part.count for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        samples, own = self._at(index)
        return samples[own]

    def pieces(self, index: int) -> Iterator[Piece]:
        samples, own = self._at(index)
        return samples.pieces(own)

    def _at(self, index: int) -> tuple[Samples, int]:
        index = range(len(self))[index]
        at = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[at]
        return part.samples, index - int(self._ends[at]) + part.count


def _cut_anew(parts: Sequence[_Part], phase: Phase, seed: int) -> list[_Part]:
    """What was read of ``parts``, and the rest of the order that was under way."""
    cut: list[_Part] = []
    before = 0
    for part in parts:
        read = min(part.count, phase.first - before)
        if read > 0:
            cut.append(_Part(part.samples, read))
        if read < part.count:
            # Orders after this one are not begun, so that they are made anew.
            rest = RestOfSamples(part.samples, read, phase.seq_length, seed)
            return [*cut, _Part(rest, len(rest))] if len(rest) > 0 else cut
        before += part.count
    return cut


class RestOfSamples(StreamSamples):
    """What is left of an order after its first ``read`` samples, in samples of another length."""

    def __init__(self, order: StreamSamples, read: int, seq_length: int, seed: int) -> None:
        left = np.ones(len(order), bool)
        left[order.shuffle_index[:read]] = False
        samples = np.flatnonzero(left)
        # Neighbours along the stream stay together: runs of samples, by the first of each.
        firsts = np.flatnonzero(np.diff(samples, prepend=-2) != 1)
        self._order = order
        self.prefix = order.prefix
        self._starts = samples[firsts] * order.seq_length
        """Where the runs lie in the stream of the order."""
        self._places = firsts * order.seq_length
        """Where they lie, laid end to end."""
        self.seq_length = seq_length
        self._num_tokens = len(samples) * order.seq_length
        count = max(0, self._num_tokens - 1) // seq_length
        self.shuffle_index = np.random.RandomState(seed).permutation(count)

    def stretch(self, start: int, length: int) -> Iterator[Piece]:
        run = int(np.searchsorted(self._places, start, side="right")) - 1
        stop = start + length
        while start < stop:
            ends = self._places[run + 1] if run + 1 < len(self._places) else self._num_tokens
            part = min(stop, int(ends)) - start
            place = int(self._starts[run]) + start - int(self._places[run])
            yield from self._order.stretch(place, part)
            start, run = start + part, run + 1
