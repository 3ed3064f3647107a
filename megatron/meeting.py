"""The ranks of a run find one another: where rank 0, or the launcher, listens.

A launcher that starts a failed run again, as ``torchrun --max-restarts`` does, goes on listening,
and still has what the ranks of the first attempt left there: the addresses of processes that are
gone. So rank 0 gives each attempt a name, under which its ranks leave what they have to say. The
launcher cannot: on several machines it does not count attempts alike.
"""

import socket
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

from megatron.environment import RankEnvironment
from megatron.errors import ConfigError, PeerError

_RETRY_SECONDS = 0.1
_LOOK_SECONDS = 0.02
_MARGIN_SECONDS = 30.0
"""By which the store is more patient than who watches over the meeting, and says more."""


@dataclass(frozen=True)
class Meeting:
    """What the ranks agree on when they meet.

    Attributes:
        store: where they tell each other their addresses.
        run: a name that no other run has.
        machines: how many they are on.
    """

    store: Store
    run: str
    machines: int

    def is_first_to_speak(self) -> bool:
        """Whether no other machine has asked this before."""
        return bool(self.store.add("speakers", 1) == 1)


def meet(seconds: float, environment: RankEnvironment) -> Meeting:
    """Find the other ranks. Collective.

    Args:
        seconds: to wait for somebody to listen.

    Raises:
        ConfigError: if another program listens where rank 0 has to.
        PeerError: if nobody listens in time.
    """
    if environment.address is None:
        return Meeting(HashStore(), run=uuid.uuid4().hex, machines=1)
    store = _open_store(environment, seconds)
    first = environment.rank == 0
    run = _invite(store, environment.world_size) if first else _answer(store, environment.rank)
    machines = int(store.get(f"machines of {run}"))
    return Meeting(PrefixStore(run, store), run, machines)


def _open_store(environment: RankEnvironment, seconds: float) -> Store:
    listens = environment.rank == 0 and not environment.launcher_listens
    if not listens:
        _await_listener(environment, seconds)
    host, port = _address(environment)
    try:
        return TCPStore(
            host,
            port,
            environment.world_size,
            is_master=listens,
            timeout=timedelta(seconds=seconds + _MARGIN_SECONDS),
            wait_for_workers=False,
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"MASTER_PORT: {environment.address} is in use by another program; choose a free port"
        ) from error


def _answer(store: Store, rank: int) -> str:
    """The name that rank 0 gives to this attempt, on another rank.

    It introduces itself by a name of its own, for which rank 0 leaves that of the run. What an
    earlier process of this rank has left gets an answer too, which nobody reads.
    """
    own = uuid.uuid4().hex
    store.set(f"rank {rank}", own)
    run = str(store.get(f"run of {own}").decode())
    store.set(f"rank {rank} of {run}", socket.gethostname())
    return run


def _invite(store: Store, world_size: int) -> str:
    """Name this attempt, and tell it to the other ranks, until all of them have heard of it."""
    run = uuid.uuid4().hex
    machines = {socket.gethostname()}
    greeted = dict.fromkeys(range(1, world_size), "")
    while greeted:
        for rank, before in list(greeted.items()):
            if store.check([f"rank {rank} of {run}"]):
                machines.add(store.get(f"rank {rank} of {run}").decode())
                del greeted[rank]
            elif store.check([f"rank {rank}"]):
                name = store.get(f"rank {rank}").decode()
                if name != before:
                    store.set(f"run of {name}", run)
                    greeted[rank] = name
        time.sleep(_LOOK_SECONDS)
    store.set(f"machines of {run}", str(len(machines)))
    return run


def _address(environment: RankEnvironment) -> tuple[str, int]:
    host, _, port = str(environment.address).rpartition(":")
    return host, int(port)


def _await_listener(environment: RankEnvironment, seconds: float) -> None:
    """Wait until somebody listens at the address; torch would tell of each attempt at length."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(_address(environment), timeout=seconds).close()
            return
        except OSError as error:
            if time.monotonic() + _RETRY_SECONDS > deadline:
                raise PeerError(
                    f"nobody listens at MASTER_ADDR:MASTER_PORT {environment.address} within "
                    f"launch.startup_timeout ({seconds:g} s): {error.strerror}"
                ) from error
        time.sleep(_RETRY_SECONDS)
