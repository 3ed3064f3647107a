"""How much memory this rank holds, has held at most, and can have.

             on a GPU                                on a CPU
    held     what torch's allocator has given out    resident memory of the process
    most     since it was last forgotten             since the process began
    can      what is free or the allocator's own     the machine's, in equal parts for its ranks

A container's control group may leave its processes less than the machine has.
"""

import os
from pathlib import Path

import torch

# Of a container, in versions 2 and 1 of control groups; any other text than a number is no limit.
_GROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def held_bytes(device: torch.device) -> int:
    """What this rank holds now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident("VmRSS:")


def peak_bytes(device: torch.device) -> int:
    """The most that this rank has held."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM:")


def forget_peak(device: torch.device) -> None:
    """On a GPU, give back what is not in use and begin a new peak; on a CPU nothing."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def available_bytes(device: torch.device, ranks: int) -> int:
    """What this rank can have in all.

    Args:
        ranks: on this machine, which share its memory if the device is a CPU.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    texts = [path.read_text().strip() for path in _GROUP_LIMITS if path.exists()]
    return min([machine, *(int(text) for text in texts if text.isdecimal())]) // ranks


def _resident(field: str) -> int:
    """A size that Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    # In KiB.
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
