"""Compares what ranks must hold alike: weights and optimizer state that exist more than once.

    axis        copies
    tensor      what is not cut over the tensor ranks: layer norms, biases of row-parallel layers
    data        everything at ZeRO 0, nothing where the state is cut over the data ranks
    embedding   the word embedding, where first and last pipeline stage share it

Faulty memory, a lost update or a wrong clip factor makes copies drift apart without an error, and
the losses look right for a long time. So each rank sums up every copy to a number of 64 bits, of
which all ranks of the axis exchange the least and the greatest. Names and ranks are asked for only
where these differ.

    fingerprint  =  sum_i bits_i * odd_i  mod 2^64

over the elements i of the whole tensor that a rank holds. A flipped bit changes the sum by a power
of two times an odd number, which is never zero; and fingerprints of parts add up to that of the
whole, which compares copies that are cut differently.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.engine.base import Engine
from megatron.errors import ReplicaError
from mpu import Axis, Box, ParallelGroups, ShardedTensor

Finding: TypeAlias = tuple[str, list[tuple[int, int]]]
"""What differs, and the rank and fingerprint of each copy."""

_AXES: tuple[Axis, ...] = ("tensor", "data", "embedding")
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = 0x9E3779B97F4A7C15 - 2**64
_ELEMENTS = 2**22
"""Elements that are summed up at once: bounds the memory besides the state."""


def check_replicas(engine: Engine, groups: ParallelGroups) -> None:
    """Compare all copies. Collective over all ranks.

    Raises:
        ReplicaError: on every rank, naming the tensors and the ranks that hold something else.
    """
    state = engine.state()
    device = engine.device
    found = [finding for axis in _AXES for finding in _compare(state, groups, axis, device)]
    gathered: list[list[Finding]] = [[] for _ in range(dist.get_world_size())]
    if _any_rank(bool(found), device):
        dist.all_gather_object(gathered, found)
        raise ReplicaError(_describe(gathered), on_every_rank=True)


def fingerprint(box: Box, shape: Sequence[int]) -> Tensor:
    """An int64 scalar, which differs between boxes of which one bit differs.

    Args:
        box: of one or two dimensions.
        shape: of the whole tensor.
    """
    tensor = box.tensor.detach().contiguous()
    bits = tensor.view(_INTEGERS[tensor.element_size()]).view(-1, tensor.size(-1))
    first_row = box.start[0] if tensor.dim() == 2 else 0
    columns = torch.arange(bits.size(1), device=tensor.device) + box.start[-1]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    step = max(1, _ELEMENTS // bits.size(1))
    for start in range(0, bits.size(0), step):
        part = bits[start : start + step]
        rows = torch.arange(start, start + part.size(0), device=tensor.device) + first_row
        index = rows.unsqueeze(1) * shape[-1] + columns
        total += (part.long() * ((index * _ODD) | 1)).sum()
    return total


def _compare(
    state: Sequence[ShardedTensor], groups: ParallelGroups, axis: Axis, device: torch.device
) -> list[Finding]:
    """What differs along ``axis``, told by the first rank of its group."""
    group = groups.along(axis)
    copies = [entry for entry in state if axis in entry.replicated_over]
    if group.size() == 1 or not copies:
        return []
    own = torch.stack([_fingerprint_of(entry, device) for entry in copies])
    if axis == "embedding" and "data" not in copies[0].replicated_over and groups.data.size() > 1:
        dist.all_reduce(own, group=groups.data)
    # The greatest of the complements is the complement of the least.
    extremes = torch.cat([own, ~own])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    greatest, least = extremes[: len(copies)], ~extremes[len(copies) :]
    differs = (greatest != least).nonzero().flatten().tolist()
    if not differs:
        return []
    mine = (dist.get_rank(), [int(own[index]) for index in differs])
    ranks: list[tuple[int, list[int]]] = [mine] * group.size()
    dist.all_gather_object(ranks, mine, group=group)
    if group.rank() > 0:
        return []
    return [
        (f"{copies[at].kind} of {copies[at].name}", [(rank, sums[n]) for rank, sums in ranks])
        for n, at in enumerate(differs)
    ]


def _fingerprint_of(entry: ShardedTensor, device: torch.device) -> Tensor:
    """An int64 scalar on ``device``, also where this rank holds nothing, or holds it elsewhere:
    ranks that give tensors of different devices to a collective wait for ever."""
    sums = [fingerprint(box, entry.shape).to(device) for box in entry.boxes]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64, device=device)


def _any_rank(found: bool, device: torch.device) -> bool:
    """Whether any rank has found a difference."""
    flag = torch.full((), found, dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def _describe(gathered: Sequence[Sequence[Finding]]) -> str:
    findings = [finding for found in gathered for finding in found]
    name, _ = findings[0]
    copies = _connected([dict(copies) for other, copies in findings if other == name])
    usual, count = Counter(copies.values()).most_common(1)[0]
    if count > len(copies) / 2:
        wrong = [rank for rank, value in copies.items() if value != usual]
        who = f"{_ranks(wrong)} differ{'s' if len(wrong) == 1 else ''} from the others"
    else:
        who = f"{_ranks(list(copies))} differ"
    names = {name for name, _ in findings}
    more = f", and copies of {len(names) - 1} other tensors" if len(names) > 1 else ""
    return f"replicas are out of sync: of the copies of the {name}, {who}{more}"


def _connected(groups: list[dict[int, int]]) -> dict[int, int]:
    """The copies of the first group, and of those that hold one of the same: two copies that differ
    do not tell which is wrong, but a third along another axis may."""
    copies = groups.pop(0)
    for group in groups:
        if set(copies.values()) & set(group.values()):
            copies |= group
    return dict(sorted(copies.items()))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
