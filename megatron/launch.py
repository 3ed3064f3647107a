"""Start and stop of torch.distributed, and the only place that reads the environment.

A launcher such as torchrun, or a cluster's own, starts one process for each rank and tells it of
the others through the environment:

    RANK, WORLD_SIZE            which of how many; a process without them is alone
    LOCAL_RANK                  which of those on this machine: its GPU; RANK where it is not set
    MASTER_ADDR, MASTER_PORT    where rank 0 listens

Slurm's srun names the first three SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID. They are read where
neither RANK nor WORLD_SIZE is set. docs/launching.md has an example for every launcher.
"""

import logging
import os
import re
import socket
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
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
_NOTICE_SECONDS = 1.5
"""Within which a launcher notices that a process has ended; deepspeed looks once a second."""
_MOST_PORT = 65535


@dataclass(frozen=True)
class _Variables:
    """The names under which a launcher tells a rank what it is."""

    rank: str
    world_size: str
    local_rank: str
    example: str
    """What sets MASTER_ADDR and MASTER_PORT too."""


_COMMON = _Variables("RANK", "WORLD_SIZE", "LOCAL_RANK", "torchrun")
_SLURM = _Variables("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "examples/launch/slurm.sbatch")


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
    names = _find_variables()
    if names is None:
        return RankEnvironment()
    world_size = _read_number(names.world_size, least=1)
    rank = _read_number(names.rank, least=0)
    if rank >= world_size:
        raise ConfigError(f"{names.rank} ({rank}) must be below {names.world_size} ({world_size})")
    told = names.local_rank in os.environ
    local_rank = _read_number(names.local_rank, least=0) if told else rank
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        return RankEnvironment()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(
                f"{name} must be set with {names.world_size} {world_size}; {names.example} does so"
            )
    port = _read_number("MASTER_PORT", least=1, most=_MOST_PORT)
    return RankEnvironment(rank, world_size, local_rank, f"{os.environ['MASTER_ADDR']}:{port}")


def _find_variables() -> _Variables | None:
    """The names that the launcher of this process uses; None without a launcher."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return _COMMON
    # The script of a batch job has SLURM_PROCID and SLURM_NTASKS too, but is no task of srun.
    return _SLURM if "SLURM_STEP_ID" in os.environ else None


def _read_number(name: str, least: int, most: int | None = None) -> int:
    return _check_number(name, os.environ.get(name), least, most)


def _check_number(name: str, text: str | None, least: int, most: int | None = None) -> int:
    number = int(text) if text is not None and text.isdecimal() else -1
    if number < least or (most is not None and number > most):
        rule = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} must be a whole number {rule}, got {text!r}")
    return number


def take_local_rank(argv: Sequence[str]) -> list[str]:
    """Take ``--local_rank N`` out of the arguments ``argv``, and return what is left.

    The deepspeed launcher adds it, and so did torch's before there was LOCAL_RANK. It has to agree
    with LOCAL_RANK, and becomes LOCAL_RANK where the launcher sets none.

    Raises:
        ConfigError: if it is not a number, or not LOCAL_RANK.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--local_rank", "--local-rank", nargs="?", const="")
    found, options = parser.parse_known_args(argv)
    if found.local_rank is not None:
        given = _check_number("--local_rank", found.local_rank, least=0)
        os.environ.setdefault("LOCAL_RANK", str(given))
        told = _read_number("LOCAL_RANK", least=0)
        if given != told:
            raise ConfigError(f"--local_rank ({given}) must be LOCAL_RANK ({told})")
    return options


def export_for_deepspeed(environment: RankEnvironment, device: torch.device) -> None:
    """Set what DeepSpeed reads from the environment by itself, before it is imported.

    LOCAL_RANK, where the launcher has set none, as srun and plain python; rank and world size
    DeepSpeed takes from the process group that is there. DS_ACCELERATOR, so that it takes the
    device of the run and not another one that it finds.
    """
    os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))
    os.environ["DS_ACCELERATOR"] = device.type


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


def let_cause_be_seen() -> None:
    """Wait a moment in a rank that lost another, before it leaves.

    A launcher ends all ranks when it sees the first that failed, and some give back its exit code.
    That must be the one that failed by itself, not one that failed in consequence.
    """
    time.sleep(_NOTICE_SECONDS)


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
        store, _, _ = next(
            rendezvous("env://", environment.rank, environment.world_size, timeout=timeout)
        )
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
