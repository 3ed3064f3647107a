"""Work that succeeds on every rank or fails on every rank, with the same error.

A rank that raised alone would leave the others waiting in their next collective. Here each rank
catches what its work raises, the ranks exchange the outcomes, and then all return or all raise.
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.errors import PeerError, RunError

T = TypeVar("T")


def run_together(action: Callable[[], T], group: ProcessGroup | None) -> list[T]:
    """Call ``action`` on every rank of ``group`` and return the results, in the order of the ranks.

    Collective, and a barrier: no rank returns before every rank is done. Without a group, this
    process is alone.

    Raises:
        RunError: on every rank, the error of the first rank that failed. A rank whose error is not
            a RunError raises it as it is, and the others a PeerError.
    """
    if group is None:
        return [action()]
    result: T | None = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        failure = caught
    outcomes: list[tuple[T, RunError | None]] = [None] * group.size()  # type: ignore[list-item]
    dist.all_gather_object(outcomes, (result, _portable(failure, group.rank())), group=group)
    if failure is not None and not isinstance(failure, RunError):
        raise failure
    for _, error in outcomes:
        if error is not None:
            raise error from failure
    return [result for result, _ in outcomes]


def run_everywhere(action: Callable[[], T], group: ProcessGroup | None) -> T:
    """Call ``action`` on every rank of ``group`` and return this rank's own result.

    Collective; raises as ``run_together`` does. The result need not be one that can be sent.
    """
    own: list[T] = []
    run_together(lambda: own.append(action()), group)
    return own[0]


def run_on_first(action: Callable[[], T], group: ProcessGroup | None) -> T:
    """Call ``action`` on the first rank of ``group`` and return its result on every rank.

    Collective; raises as ``run_together`` does.
    """
    first = group is None or group.rank() == 0
    return run_together(lambda: action() if first else None, group)[0]  # type: ignore[return-value]


def _portable(failure: Exception | None, rank: int) -> RunError | None:
    """``failure`` as an error that another rank can raise."""
    if failure is None:
        return None
    if isinstance(failure, RunError):
        return type(failure)(str(failure), on_every_rank=True)
    return PeerError(f"rank {rank} failed: {type(failure).__name__}: {failure}")
