"""Whether ranks ask for the same collectives: what a GPU would show by waiting for ever.

A group's collectives are one sequence, of which every rank has to ask for the same, in the same
order, with tensors of the same device, dtype and size. So are the transfers from one rank of a
group to another. Gloo sums tensors of different dtypes into garbage; and where one rank gives a
tensor on the CPU and another one on a GPU, the two wait in different backends.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TypeAlias

from tests.pretend.device import NAME, Call

Ranks: TypeAlias = tuple[int, ...]


def find_faults(calls: Sequence[Sequence[Call]]) -> list[str]:
    """What would go wrong between ranks, of each of which ``calls`` has all."""
    return [
        *(fault for rank, own in enumerate(calls) for fault in _host_faults(rank, own)),
        *_collective_faults(calls),
        *_transfer_faults(calls),
    ]


def _host_faults(rank: int, calls: Sequence[Call]) -> Iterator[str]:
    for call in calls:
        if not call.is_host_side and set(call.devices) != {NAME}:
            yield f"rank {rank} gives a tensor that is not on the device: {call}"


def _collective_faults(calls: Sequence[Sequence[Call]]) -> Iterator[str]:
    of_group: dict[Ranks, dict[int, list[Call]]] = defaultdict(dict)
    for rank, own in enumerate(calls):
        for call in own:
            if not call.is_transfer:
                of_group[call.ranks].setdefault(rank, []).append(call)
    for ranks, sequences in of_group.items():
        first, *others = ranks
        for other in others:
            yield from _first_difference(
                first, sequences.get(first, []), other, sequences.get(other, [])
            )


def _transfer_faults(calls: Sequence[Sequence[Call]]) -> Iterator[str]:
    """Compare what is sent from each rank to each other with what is received there."""
    sent: dict[tuple[Ranks, int, int], list[Call]] = defaultdict(list)
    received: dict[tuple[Ranks, int, int], list[Call]] = defaultdict(list)
    for rank, own in enumerate(calls):
        for call in own:
            if call.is_transfer:
                peer = call.ranks[int(call.options[0])]
                # The peer is another on the two sides.
                plain = replace(call, operation="transfer", options=call.options[1:])
                if call.operation == "send":
                    sent[call.ranks, rank, peer].append(plain)
                else:
                    received[call.ranks, peer, rank].append(plain)
    for key in sorted({*sent, *received}):
        _, source, target = key
        yield from _first_difference(source, sent[key], target, received[key])


def _first_difference(
    rank: int, calls: Sequence[Call], other: int, others: Sequence[Call]
) -> Iterator[str]:
    for number, (one, two) in enumerate(zip_longest(calls, others)):
        if _content(one) != _content(two):
            yield f"call {number} of ranks {rank} and {other}: {one}, but {two}"
            return


def _content(call: Call | None) -> Call | None:
    """Two ranks may come to the same collective by different lines."""
    return None if call is None else replace(call, place="", is_host_side=False)
