"""Looks for numbers of the training state that are none: infinities and NaNs.

A gradient that is not finite ends a step before it changes anything. But memory that fails, or a
kernel that is wrong, may spoil a weight or a moment after that, also where it exists once and no
copy could tell. What is saved would hand it on to every later start, and old saves would give way
to it. So all of the state is looked at before each save, and after each load.
"""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.errors import NonFiniteError
from mpu import ShardedTensor

Finding: TypeAlias = tuple[int, list[str]]
"""A rank, and what of its state is not finite."""


def check_finite(
    state: Iterable[ShardedTensor], device: torch.device, *, group: ProcessGroup | None
) -> None:
    """Refuse a state with a number that is none; see ``find_not_finite``. Collective.

    Raises:
        NonFiniteError: on every rank, naming what is not finite and the ranks that hold it.
    """
    found = find_not_finite(state, device, group=group)
    if found is not None:
        raise NonFiniteError(found, on_every_rank=True)


def find_not_finite(
    state: Iterable[ShardedTensor], device: torch.device, *, group: ProcessGroup | None
) -> str | None:
    """Look at every number of the state. Collective over ``group``: all ranks learn the same.

    Args:
        state: what this rank holds.
        device: where the ranks exchange what they found.
        group: None is all ranks.

    Returns:
        What is not finite, and on which ranks; None if everything is finite.
    """
    mine = [f"{entry.kind} of {entry.name}" for entry in state if not is_finite(entry)]
    flag = torch.tensor([bool(mine)], dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    if not flag:
        return None
    gathered: list[Finding] = [(0, [])] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (dist.get_rank(), mine), group=group)
    return _describe(gathered)


def is_finite(entry: ShardedTensor) -> bool:
    """Whether all that this rank holds of a tensor is finite."""
    tensors = [box.tensor.detach() for box in entry.boxes if box.tensor.numel() > 0]
    # NaN is both the least and the greatest of what it is among.
    extremes: list[Tensor] = [extreme for tensor in tensors for extreme in torch.aminmax(tensor)]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def _describe(gathered: Sequence[Finding]) -> str:
    first = next(names[0] for _, names in gathered if names)
    ranks = [rank for rank, names in gathered if first in names]
    others = {name for _, names in gathered for name in names} - {first}
    where = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    more = f", nor are parts of {len(others)} other tensors" if others else ""
    return f"the {first} is not finite on {where}{more}"
