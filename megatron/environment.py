"""What the launcher tells this process, and the only place that reads the environment.

A launcher such as torchrun, or a cluster's own, starts one process for each rank and tells it of
the others through the environment:

    RANK, WORLD_SIZE            which of how many; a process without them is alone
    LOCAL_RANK                  which of those on this machine: its GPU; RANK where it is not set
    MASTER_ADDR, MASTER_PORT    where rank 0 listens

Slurm's srun names the first three SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID. They are read where
neither RANK nor WORLD_SIZE is set. docs/launching.md has an example for every launcher.

Imports nothing that is slow, so that a process knows what it is before it has imported torch.
"""

import os
import re
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.errors import ConfigError

if TYPE_CHECKING:
    import torch

_MOST_PORT = 65535
_TORCHRUN = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
_STEP = ("SLURM_JOB_ID", "SLURM_STEP_ID")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_HOST = re.compile(r"[A-Za-z0-9_:\[][A-Za-z0-9_.:%\[\]-]{0,254}")


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
    launcher_listens: bool = False
    """It is the launcher that listens there, as torchrun does, and not rank 0."""


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
    address = os.environ["MASTER_ADDR"]
    if not _HOST.fullmatch(address):
        raise ConfigError(f"MASTER_ADDR must be the name or the address of a host, got {address!r}")
    port = _read_number("MASTER_PORT", least=1, most=_MOST_PORT)
    return RankEnvironment(
        rank,
        world_size,
        local_rank,
        f"{address}:{port}",
        launcher_listens=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def find_launch() -> str | None:
    """What the ranks that one launcher has started on this machine have in common, and no others.

    None for a process that is alone. No variable is checked.
    """
    names = _find_variables()
    if names is None or os.environ.get(names.world_size) == "1":
        return None
    # A task of srun may have a shell of its own around it; else all are children of the launcher.
    own = _STEP if names is _SLURM else _TORCHRUN
    facts = [os.environ.get(name, "") for name in (*own, *_ADDRESS)]
    if names is _COMMON:
        parent = os.getppid()
        facts += [str(parent), str(start_of(parent))]
    return " ".join(facts)


def start_of(process: int) -> int | None:
    """When a process was started, in clock ticks since the machine was; None if nobody tells."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    # The name of the program, in brackets, may hold anything.
    return int(text.rpartition(")")[2].split()[19])


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


def export_for_deepspeed(environment: RankEnvironment, device: "torch.device") -> None:
    """Set what DeepSpeed reads from the environment by itself, before it is imported.

    LOCAL_RANK, where the launcher has set none, as srun and plain python; rank and world size
    DeepSpeed takes from the process group that is there. DS_ACCELERATOR, so that it takes the
    device of the run and not another one that it finds.
    """
    os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))
    os.environ["DS_ACCELERATOR"] = device.type
