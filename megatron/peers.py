"""What a rank does about the others: how long it waits, and what it says of one that it lost."""

import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.cli import leave
from megatron.errors import LatePeerError, PeerError
from megatron.spokesman import Spokesman

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
_GRACE_SECONDS = 4.0
"""Within which a rank has found by itself what another has told."""
_ABORT_SECONDS = 1.0


@contextmanager
def during(what: str | None = None) -> Iterator[None]:
    """Turn what torch raises for a lost or late peer into a PeerError that says in what it was.

    Who waits for this rank learns of it at once, since its connections are cut. Else a chain of
    ranks that wait for one another would leave one by one.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        _cut_connections()
        place = "" if what is None else f" in {what}"
        reason = _reason(error)
        kind = LatePeerError if "timed out" in reason.lower() else PeerError
        raise kind(f"another rank was lost or did not answer{place}: {reason}") from error


def _reason(error: RuntimeError) -> str:
    """What torch says, without places in its sources, and without its wishes."""
    line = re.sub(r"\[[^\[\]\s]*/[^\[\]\s]*:\d+\]\s*", "", str(error).splitlines()[0])
    line = line.partition("This is typically caused by")[0].partition("GLHF")[0]
    return line.encode("ascii", "ignore").decode().strip().removesuffix(".")


def _cut_connections() -> None:
    """Close the connections of all groups, as far as their backends do it in time."""

    def abort() -> None:
        for group in _all_groups():
            group.abort()

    thread = threading.Thread(target=abort, daemon=True)
    thread.start()
    thread.join(_ABORT_SECONDS)


def set_timeout(seconds: float) -> None:
    """Let this rank wait so long in every group that it is in, whoever has built it."""
    for group in _all_groups():
        for device in group._device_types:
            backend = group._get_backend(device)
            backend._set_default_timeout(timedelta(seconds=seconds))


def _all_groups() -> list[ProcessGroup]:
    return list(dist.distributed_c10d._world.pg_map)


@contextmanager
def watched(seconds: float, complaint: str, spokesman: Spokesman) -> Iterator[None]:
    """End the process from outside, if the body takes more than ``seconds``.

    What waits inside torch need not have a timeout of its own: for a store whose server does not
    answer, for instance, or for a GPU that waits for another. The process also ends if another
    rank of this machine has said why it does, and the body goes on for all that.

    Args:
        complaint: what is said then.
    """
    done = threading.Event()
    deadline = time.monotonic() + seconds

    def watch() -> None:
        while not done.wait(_LOOK_SECONDS):
            if spokesman.has_spoken():
                if done.wait(_GRACE_SECONDS):
                    return
                leave(PeerError.exit_code)
            if time.monotonic() > deadline:
                spokesman.say(lambda: logger.error("%s", complaint))
                leave(PeerError.exit_code)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


@contextmanager
def waiting(
    what: str, seconds: float, device: torch.device, spokesman: Spokesman
) -> Iterator[None]:
    """Do what needs the other ranks, and wait ``seconds`` at most for one of them. Collective.

    A CPU waits in one collective after another, which have timeouts. A GPU does so by itself, while
    this process waits for the GPU; NCCL would end it by SIGABRT. So there the time counts for the
    whole.
    """
    with during(what):
        if device.type == "cpu":
            yield
            return
        complaint = f"another rank did not answer in {what} within launch.timeout ({seconds:g} s)"
        with watched(seconds, complaint, spokesman):
            yield
