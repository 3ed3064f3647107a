"""Start and stop of torch.distributed, and the only place that reads the environment.

A launcher such as torchrun, or a cluster's own, starts one process for each rank and tells it of
the others through the environment:

    RANK, WORLD_SIZE            which of how many; a process without them is alone
    LOCAL_RANK                  which of those on this machine: its GPU
    MASTER_ADDR, MASTER_PORT    where rank 0 listens
"""

import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from megatron.config import LaunchConfig
from megatron.errors import ConfigError, PeerError
from mpu import ParallelDims, ParallelGroups, build_groups

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 0.1


@dataclass(frozen=True)
class RankEnvironment:
    """What the launcher tells this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str | None = None
    """Host and port of rank 0; None for a process that is alone."""


@dataclass(frozen=True)
class Launch:
    """A process that has found its peers."""

    rank: int
    world_size: int
    device: torch.device
    groups: ParallelGroups


def read_environment() -> RankEnvironment:
    """What the launcher tells this process.

    Raises:
        ConfigError: if a variable is missing, not a number, or out of range.
    """
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return RankEnvironment()
    world_size = _read_number(os.environ, "WORLD_SIZE", least=1)
    rank = _read_number(os.environ, "RANK", least=0)
    if rank >= world_size:
        raise ConfigError(f"RANK ({rank}) must be below WORLD_SIZE ({world_size})")
    local_rank = rank
    if "LOCAL_RANK" in os.environ:
        local_rank = _read_number(os.environ, "LOCAL_RANK", least=0)
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        return RankEnvironment()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(f"{name} must be set with WORLD_SIZE {world_size}; torchrun does so")
    port = _read_number(os.environ, "MASTER_PORT", least=1)
    return RankEnvironment(rank, world_size, local_rank, f"{os.environ['MASTER_ADDR']}:{port}")


def _read_number(environment: Mapping[str, str], name: str, least: int) -> int:
    text = environment.get(name)
    if text is None or not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {text!r}")
    return int(text)


@contextmanager
def launched(
    layout: Callable[[int], ParallelDims], config: LaunchConfig, environment: RankEnvironment
) -> Iterator[Launch]:
    """Meet the other ranks, and part from them at the end.

    Collective: all ranks enter, and leave, together. A rank that fails inside leaves at once; the
    others notice at their next collective.

    Args:
        layout: the rank grid on a number of ranks; called before anybody waits for anybody.

    Raises:
        ConfigError: for a device or a port that cannot be had.
        PeerError: if a rank is lost, or does not come or answer in time.
    """
    dims = layout(environment.world_size)
    device = _choose_device(config, environment)
    # Attention probabilities of far keys are denormal numbers, which slow a CPU down twofold.
    torch.set_flush_denormal(True)
    with _peer_errors():
        with _deadline(config.startup_timeout, environment):
            _join(config, environment, device)
            groups = build_groups(dims)
        yield Launch(environment.rank, environment.world_size, device, groups)
        # A rank that left early would cut the connections that its peers still use.
        dist.barrier()
    dist.destroy_process_group()


def leave(exit_code: int) -> NoReturn:
    """End this process at once, without waiting for threads that wait for lost peers."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _choose_device(config: LaunchConfig, environment: RankEnvironment) -> torch.device:
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if environment.local_rank >= count:
        raise ConfigError(
            f"launch.device {config.device}: local rank {environment.local_rank} needs a GPU of "
            f"its own, and this machine has {count}"
        )
    device = torch.device("cuda", environment.local_rank)
    torch.cuda.set_device(device)
    return device


def _join(config: LaunchConfig, environment: RankEnvironment, device: torch.device) -> None:
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=_open_store(config, environment),
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timedelta(seconds=config.timeout),
    )


def _open_store(config: LaunchConfig, environment: RankEnvironment) -> Store:
    """Where the ranks tell each other their addresses."""
    if environment.address is None:
        return HashStore()
    if environment.rank > 0:
        _await_first_rank(config, environment)
    timeout = timedelta(seconds=config.startup_timeout)
    try:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"MASTER_PORT: {environment.address} is in use by another program; choose a free port"
        ) from error
    # The timeout above was for the start; later the store waits as long as the collectives.
    store.set_timeout(timedelta(seconds=config.timeout))
    found: Store = store
    return found


def _await_first_rank(config: LaunchConfig, environment: RankEnvironment) -> None:
    """Wait until somebody listens at the address; torch would tell of each attempt at length."""
    host, _, port = str(environment.address).rpartition(":")
    deadline = time.monotonic() + config.startup_timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=config.startup_timeout).close()
            return
        except OSError as error:
            if time.monotonic() + _RETRY_SECONDS > deadline:
                raise PeerError(
                    f"nobody listens at MASTER_ADDR:MASTER_PORT {environment.address} within "
                    f"launch.startup_timeout ({config.startup_timeout:g} s): {error.strerror}"
                ) from error
        time.sleep(_RETRY_SECONDS)


@contextmanager
def _deadline(seconds: float, environment: RankEnvironment) -> Iterator[None]:
    """End the process if the body takes longer: another program may listen at the port, and a
    connection that it accepts but never answers has no timeout of its own."""

    def give_up() -> None:
        logger.error(
            "not all of %d ranks met at %s within launch.startup_timeout (%g s)",
            environment.world_size,
            environment.address,
            seconds,
        )
        leave(PeerError.exit_code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Turn what torch raises for a lost or late peer into a PeerError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            # Without the place in the C++ source that gloo begins with.
            reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0])
            raise PeerError(f"another rank was lost or did not answer: {reason}") from error
        raise
