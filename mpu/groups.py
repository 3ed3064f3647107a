"""Process groups of the (pipeline, data, tensor) rank grid.

Ranks are laid out tensor-fastest, then data, then pipeline:

    rank = (pipeline_rank * data + data_rank) * tensor + tensor_rank

so that a tensor group is always a run of neighbouring ranks, which a cluster puts on one node. With
``ParallelDims(tensor=2, data=2)``:

    tensor groups  [0, 1] [2, 3]        data groups  [0, 2] [1, 3]

A rank builds the groups that it is in, and waits for their members only. The same ranks never make
two groups: an axis that holds the ranks of another, or of the whole world, has its very group, and
all axes of a single rank share one group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the rank grid; their product is the world size."""

    tensor: int = 1
    data: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < 1:
                raise ValueError(f"{name} parallel size must be at least 1, got {size}")

    @property
    def world_size(self) -> int:
        return self.tensor * self.data * self.pipeline


Axis: TypeAlias = Literal["tensor", "data", "embedding"]
"""Names of the groups of which all ranks may hold copies of a tensor."""


@dataclass(frozen=True)
class ParallelGroups:
    """The groups that this rank belongs to.

    Attributes:
        tensor: ranks that hold the slices of one layer.
        data: ranks that hold the same slice and read different samples.
        pipeline: ranks that hold the stages of one model, first stage first.
        model: all ranks of one model replica (tensor x pipeline).
        embedding: first and last stage of this rank's pipeline, which share tied embeddings; on a
            rank of a stage between them, that rank alone.
    """

    dims: ParallelDims
    tensor: ProcessGroup
    data: ProcessGroup
    pipeline: ProcessGroup
    model: ProcessGroup
    embedding: ProcessGroup

    def along(self, axis: Axis) -> ProcessGroup:
        """The group of ``axis``."""
        group: ProcessGroup = getattr(self, axis)
        return group


def build_groups(dims: ParallelDims, timeout: timedelta | None = None) -> ParallelGroups:
    """Create the groups of this rank.

    Collective: every rank of the world calls it, with the same arguments.

    Args:
        timeout: how long a rank waits in a collective of these groups; None is torch's own. The
            world, which may be one of them, keeps the one that it has.

    Raises:
        ValueError: if ``dims`` does not fill the world.
    """
    world_size = dist.get_world_size()
    if dims.world_size != world_size:
        raise ValueError(f"{dims} needs {dims.world_size} ranks, but the world has {world_size}")

    rank = dist.get_rank()
    grid = torch.arange(world_size).view(dims.pipeline, dims.data, dims.tensor)
    stage, replica, place = (int(index) for index in (grid == rank).nonzero()[0])
    pipeline = grid[:, replica, place].tolist()
    ends = sorted({pipeline[0], pipeline[-1]})
    build = _Builder(timeout)
    return ParallelGroups(
        dims=dims,
        tensor=build(grid[stage, replica].tolist()),
        data=build(grid[stage, :, place].tolist()),
        pipeline=build(pipeline),
        model=build(grid[:, replica].flatten().tolist()),
        # Last: torch names a group by the number of those before it, which is now the same on all
        # ranks, and after it is not.
        embedding=build(ends if rank in ends else [rank]),
    )


class _Builder:
    """Builds each group once."""

    def __init__(self, timeout: timedelta | None) -> None:
        self._timeout = timeout
        world = dist.group.WORLD
        assert world is not None
        self._built: dict[tuple[int, ...], ProcessGroup] = {
            tuple(range(dist.get_world_size())): world
        }

    def __call__(self, ranks: Sequence[int]) -> ProcessGroup:
        """The group of ``ranks``, of which this rank is one. Collective over them."""
        key = tuple(ranks)
        if key not in self._built:
            self._built[key] = dist.new_group(
                list(ranks), timeout=self._timeout, use_local_synchronization=True
            )
        return self._built[key]
