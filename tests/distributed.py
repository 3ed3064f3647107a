"""Run a test body on several ranks of one machine: gloo on the CPU, NCCL where GPUs are."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

TIMEOUT = timedelta(seconds=60)

_PRELOADED: list[str] = []


def preload(*modules: str) -> None:
    """Let ranks be forked from a server that has imported ``modules``, which are slow to import.

    They are as isolated as spawned ones, and ten times faster to start. To be called when a module
    of tests is imported, before the first test starts the server.
    """
    _PRELOADED.extend(name for name in modules if name not in _PRELOADED)
    multiprocessing.set_forkserver_preload(_PRELOADED)


# Torch imports its _dynamo on the first use of many functions.
preload("pytest", "torch._dynamo", "megatron.engine.torch_engine")


def run_ranks(world_size: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``body(*args)`` on ``world_size`` ranks and return what each of them returned.

    The test fails with the traceback of the first rank that fails. ``body`` must be a module-level
    function, because each rank is a new process. The ranks meet through a file, so that concurrent
    tests never fight over a port.
    """
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _run_rank,
            args=(world_size, folder, body, args),
            nprocs=world_size,
            start_method="forkserver",
        )
        results = [Path(folder) / f"{rank}.pt" for rank in range(world_size)]
        return [torch.load(path, weights_only=False) for path in results]


def _run_rank(
    rank: int, world_size: int, folder: str, body: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"file://{Path(folder) / 'store'}",
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    torch.save(body(*args), Path(folder) / f"{rank}.pt")
    # A rank that left early would cut the connections its slower peers are making.
    dist.barrier()
    dist.destroy_process_group()
