"""Start and stop of torch.distributed: the ranks of a run meet, and part at its end."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.cli import leave, let_cause_be_seen
from megatron.config import LaunchConfig
from megatron.environment import (
    RankEnvironment,
    export_for_deepspeed,
    read_environment,
    take_local_rank,
)
from megatron.errors import ConfigError
from megatron.meeting import meet
from megatron.peers import during, waiting, watched
from megatron.spokesman import Spokesman
from mpu import ParallelDims, ParallelGroups, build_groups

__all__ = [
    "Launch",
    "RankEnvironment",
    "export_for_deepspeed",
    "launched",
    "leave",
    "let_cause_be_seen",
    "read_environment",
    "take_local_rank",
]


@dataclass(frozen=True)
class Launch:
    """A process that has found its peers.

    Attributes:
        timeout: seconds that it waits for one of them.
        spokesman: what it shares with them to say once why they end.
    """

    rank: int
    world_size: int
    device: torch.device
    groups: ParallelGroups
    timeout: float = LaunchConfig.timeout
    spokesman: Spokesman = field(default_factory=lambda: Spokesman(None))

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """For work that needs the other ranks: name it in the error, if one does not come."""
        return waiting(what, self.timeout, self.device, self.spokesman)


@contextmanager
def launched(
    layout: Callable[[int], ParallelDims],
    config: LaunchConfig,
    environment: RankEnvironment,
    spokesman: Spokesman | None = None,
) -> Iterator[Launch]:
    """Meet the other ranks, and part from them at the end.

    Collective: all ranks enter, and leave, together. A rank that fails inside leaves at once; the
    others notice at their next collective.

    Args:
        layout: the rank grid on a number of ranks; called before anybody waits for anybody.
        spokesman: the one that the program ends with; None is one like it.

    Raises:
        ConfigError: for a device or a port that cannot be had.
        PeerError: if a rank is lost, or does not come or answer in time.
    """
    spokesman = spokesman or Spokesman.of_process()
    dims = layout(environment.world_size)
    device = _choose_device(config, environment)
    # Attention probabilities of far keys are denormal numbers, which slow a CPU down twofold.
    torch.set_flush_denormal(True)
    timeout = timedelta(seconds=config.timeout)
    with _meeting(config, environment, spokesman):
        met = meet(config.startup_timeout, environment)
        spokesman.meet(met.run, met.is_first_to_speak if met.machines > 1 else None)
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=met.store,
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timeout,
        )
        groups = build_groups(dims, timeout)
    # The timeout before was for the start; later the store waits as long as the collectives.
    met.store.set_timeout(timeout)
    try:
        with during():
            yield Launch(
                environment.rank, environment.world_size, device, groups, config.timeout, spokesman
            )
    except BaseException:
        # Alone, a program may go on: a notebook starts again. Among others it ends, and at once.
        if environment.world_size == 1:
            dist.destroy_process_group()
        raise
    with during("the end of the run"):
        # A rank that left early would cut the connections that its peers still use.
        dist.barrier()
    dist.destroy_process_group()


@contextmanager
def _meeting(
    config: LaunchConfig, environment: RankEnvironment, spokesman: Spokesman
) -> Iterator[None]:
    complaint = (
        f"not all of {environment.world_size} ranks met at {environment.address} within "
        f"launch.startup_timeout ({config.startup_timeout:g} s)"
    )
    with (
        during("the meeting of all ranks"),
        watched(config.startup_timeout, complaint, spokesman),
    ):
        yield


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
