"""Torch's operators of symmetric memory, on a CPU.

Torch registers what they mean, in collectives and products, for tensors without data only. Here it
is registered for tensors in the CPU's memory too, in the process of a rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed._symmetric_memory as symmetric_memory
from torch.library import Library

_FALLBACKS = {
    "fused_all_gather_matmul": symmetric_memory._fused_all_gather_matmul_fallback,
    "fused_matmul_reduce_scatter": symmetric_memory._fused_matmul_reduce_scatter_fallback,
}


@contextmanager
def operators_on_cpu() -> Iterator[None]:
    """Let the operators take tensors on a CPU."""
    # They do for as long as this object is there.
    library = Library("symm_mem", "IMPL")
    for name, fallback in _FALLBACKS.items():
        library.impl(name, fallback, "CPU")
    yield
