"""Work that succeeds on every rank or fails on every rank, with the same error.

A rank that raised alone would leave the others waiting in their next collective. Here each rank
catches what its work raises, the ranks agree on whether it was well everywhere, and then all return
or all raise:

    all_reduce of one number    the first rank that failed, if any
    its error, broadcast        only then

What one rank has found out is sent to those that need it and to nobody else, so that what a rank
sends, receives and keeps does not grow with the number of ranks. All of it goes through the CPU's
backend, which every group has.
"""

import pickle
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.errors import PeerError, RunError

T = TypeVar("T")

_BYTES_AT_ONCE = 1 << 28
_FIRST_LOOK_SECONDS, _LOOK_SECONDS = 0.002, 1.0


def run_everywhere(action: Callable[[], T], group: ProcessGroup | None) -> T:
    """Call ``action`` on every rank of ``group`` and return this rank's own result.

    Collective, and a barrier: no rank returns before every rank is done. Without a group, this
    process is alone.

    Raises:
        RunError: on every rank, the error of the first rank that failed. A rank whose error is not
            a RunError raises it as it is, and the others a PeerError.
    """
    if group is None:
        return action()
    results: list[T] = []
    failure: Exception | None = None
    try:
        results.append(action())
    except Exception as caught:
        failure = caught
    _raise_first(failure, group)
    return results[0]


def run_together(action: Callable[[], T], group: ProcessGroup | None) -> list[T]:
    """Call ``action`` on every rank of ``group`` and return the results, in the order of the ranks.

    Collective; raises as ``run_everywhere`` does. For small results: every rank gets all of them.
    """
    if group is None:
        return [action()]
    result = run_everywhere(action, group)
    results: list[T] = [result] * group.size()
    dist.all_gather_object(results, result, group=group)
    return results


def run_on_first(action: Callable[[], T], group: ProcessGroup | None) -> T:
    """Call ``action`` on the first rank of ``group`` and return its result on every rank.

    Collective; raises as ``run_everywhere`` does.
    """
    if group is None:
        return action()
    results: list[T] = []

    def pack() -> bytes | None:
        if group.rank() > 0:
            return None
        results.append(action())
        return pickle.dumps(results[0])

    data = _broadcast(run_everywhere(pack, group), 0, group)
    return results[0] if results else pickle.loads(data)


def gather_on_first(action: Callable[[], T], group: ProcessGroup | None) -> list[T]:
    """Call ``action`` on every rank of ``group``; the first rank gets the results, in their order.

    Collective; raises as ``run_everywhere`` does. The other ranks get an empty list.
    """
    if group is None:
        return [action()]
    result = run_everywhere(action, group)
    if group.rank() > 0:
        send(result, 0, group)
        return []
    return [result, *(receive(rank, group) for rank in range(1, group.size()))]


def run_patiently(action: Callable[[], T], group: ProcessGroup | None) -> T:
    """``run_everywhere`` for work that may take longer than a collective waits.

    Collective all the while: the ranks look after each other every second, so that one that is lost
    is noticed, and none is taken for lost because it works.
    """
    if group is None:
        return action()
    work: Future[T] = Future()
    Thread(target=_do, args=(action, work), daemon=True).start()
    seconds, left = _FIRST_LOOK_SECONDS, True
    while left:
        wait([work], seconds)
        seconds = min(2 * seconds, _LOOK_SECONDS)
        left = _reduce(not work.done(), dist.ReduceOp.MAX, group) > 0
    return run_everywhere(work.result, group)


def _do(action: Callable[[], T], work: "Future[T]") -> None:
    try:
        work.set_result(action())
    except BaseException as error:
        work.set_exception(error)


def send(value: object, rank: int, group: ProcessGroup) -> None:
    """Send ``value`` to ``rank`` of ``group``, which has to ``receive`` it."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [_as_tensor(head), *(_as_tensor(buffer.raw()) for buffer in buffers)]
    target = dist.get_global_rank(group, rank)
    for sizes in ([len(parts)], [len(part) for part in parts]):
        dist.send(_numbers(sizes), target, group)
    for piece in _pieces(parts):
        dist.send(piece, target, group)


def receive(rank: int, group: ProcessGroup) -> Any:
    """What ``rank`` of ``group`` sends to this rank."""
    source = dist.get_global_rank(group, rank)
    count = _numbers([0])
    dist.recv(count, source, group)
    sizes = _numbers([0] * int(count))
    dist.recv(sizes, source, group)
    parts = [_new_bytes(size) for size in sizes.tolist()]
    for piece in _pieces(parts):
        dist.recv(piece, source, group)
    # Arrays stay in the memory that they were received in.
    head, *buffers = (part.numpy() for part in parts)
    return pickle.loads(head.tobytes(), buffers=buffers)


def _pieces(parts: Iterable[Tensor]) -> Iterable[Tensor]:
    return (piece for part in parts if len(part) > 0 for piece in part.split(_BYTES_AT_ONCE))


def _raise_first(failure: Exception | None, group: ProcessGroup) -> None:
    """Raise the error of the first rank that failed, if one did."""
    own = group.size() if failure is None else group.rank()
    first = _reduce(own, dist.ReduceOp.MIN, group)
    if first == group.size():
        return
    data = None if failure is None else pickle.dumps(_portable(failure, group.rank()))
    error: RunError = pickle.loads(_broadcast(data, first, group))
    if failure is not None and not isinstance(failure, RunError):
        raise failure
    raise error from failure


def _portable(failure: Exception, rank: int) -> RunError:
    """``failure`` as an error that another rank can raise."""
    if isinstance(failure, RunError):
        return type(failure)(str(failure), on_every_rank=True)
    return PeerError(f"rank {rank} failed: {type(failure).__name__}: {failure}")


def _reduce(number: int, operation: dist.ReduceOp.RedOpType, group: ProcessGroup) -> int:
    numbers = _numbers([number])
    dist.all_reduce(numbers, operation, group)
    return int(numbers)


def _broadcast(data: bytes | None, rank: int, group: ProcessGroup) -> bytes:
    """``data`` of ``rank`` on every rank."""
    source = dist.get_global_rank(group, rank)
    mine = data is not None and group.rank() == rank
    size = _numbers([len(data) if mine and data is not None else 0])
    dist.broadcast(size, source, group)
    content = _as_tensor(data) if mine and data is not None else _new_bytes(int(size))
    dist.broadcast(content, source, group)
    return content.numpy().tobytes()


def _numbers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _new_bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _as_tensor(data: bytes | memoryview) -> Tensor:
    if len(data) == 0:
        return _new_bytes(0)
    # Torch warns of memory that it must not write to.
    return torch.frombuffer(
        bytearray(data) if memoryview(data).readonly else data, dtype=torch.uint8
    )
