"""Process groups of ranks that do not exist, for models whose tensors have no values.

Torch's fake process group has a rank and a size, and collectives that do nothing. On the meta
device that is all that a model of any layout needs to be built and sent through its passes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from mpu import ParallelDims, ParallelGroups, build_groups


@contextmanager
def absent_peers(dims: ParallelDims, place: int = 0) -> Iterator[ParallelGroups]:
    """The groups of the first rank at a place of the pipeline, whose collectives do nothing.

    Needs a process without a process group, and leaves it without one.
    """
    # The import makes the backend known, which a run has no use for.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group(
        "fake",
        store=FakeStore(),
        rank=place * dims.data * dims.tensor,
        world_size=dims.world_size,
    )
    try:
        yield build_groups(dims)
    finally:
        dist.destroy_process_group()
