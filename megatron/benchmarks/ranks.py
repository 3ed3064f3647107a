"""Run a function on ranks of its own, started as the product starts its ranks.

Each rank is a new process, so that a measurement begins with nothing of an earlier one: no memory
that was freed, no buffers of another model. The function gets the rank's ``Launch`` and returns
something to its caller.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron.config import LaunchConfig
from megatron.launch import launched, read_environment
from mpu import ParallelDims, ParallelGroups

Device: TypeAlias = Literal["cpu", "cuda"]

# Imported once, by the server that the ranks are forked from.
_SLOW_IMPORTS = ["torch._dynamo", "megatron.engine.torch_engine"]

_PATIENCE = 120.0
"""Seconds that a rank waits for another; the turns of a benchmark are shorter."""


def run_ranks(
    dims: ParallelDims, body: Callable[..., Any], *args: Any, device: Device = "cpu"
) -> list[Any]:
    """Call ``body(launch, *args)`` on every rank of the grid ``dims``; what each of them returned.

    Args:
        body: a module-level function. What it raises is raised here.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(_SLOW_IMPORTS)
    # Open before there are ranks, as torchrun has it: no other program can take its port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ProcessPoolExecutor(dims.world_size, mp_context=context) as pool:
        ranks = [
            pool.submit(_run_rank, rank, dims, store.port, device, body, args)
            for rank in range(dims.world_size)
        ]
        return [rank.result() for rank in ranks]


def run_alone(body: Callable[..., Any], *args: Any, device: Device = "cpu") -> Any:
    """``run_ranks`` with one rank."""
    return run_ranks(ParallelDims(), body, *args, device=device)[0]


def build_alone() -> ParallelGroups:
    """Groups in which this rank is alone. Collective: every rank calls it."""
    group, _ = dist.new_subgroups_by_enumeration([[r] for r in range(dist.get_world_size())])
    return ParallelGroups(ParallelDims(), group, group, group, group, group)


def _run_rank(
    rank: int,
    dims: ParallelDims,
    port: int,
    device: Device,
    body: Callable[..., Any],
    args: tuple[Any, ...],
) -> Any:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(dims.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LaunchConfig(device=device, startup_timeout=_PATIENCE, timeout=_PATIENCE)
    with launched(lambda _: dims, config, read_environment()) as launch:
        return body(launch, *args)
