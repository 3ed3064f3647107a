"""Process groups of the (pipeline, data, tensor) rank grid.

Ranks are laid out tensor-fastest, then data, then pipeline:

    rank = (pipeline_rank * data + data_rank) * tensor + tensor_rank

so that a tensor group is always a run of neighbouring ranks, which a cluster puts on one node. With
``ParallelDims(tensor=2, data=2)``:

    tensor groups  [0, 1] [2, 3]        data groups  [0, 2] [1, 3]
"""

from dataclasses import dataclass
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


def build_groups(dims: ParallelDims) -> ParallelGroups:
    """Create every group of the grid and return those of this rank.

    Collective: every rank of the world calls it, with the same ``dims``.

    Raises:
        ValueError: if ``dims`` does not fill the world.
    """
    world_size = dist.get_world_size()
    if dims.world_size != world_size:
        raise ValueError(f"{dims} needs {dims.world_size} ranks, but the world has {world_size}")

    grid = torch.arange(world_size).view(dims.pipeline, dims.data, dims.tensor)
    pipelines = grid.movedim(0, -1).reshape(-1, dims.pipeline)
    return ParallelGroups(
        dims=dims,
        tensor=_build_group(grid.reshape(-1, dims.tensor).tolist()),
        data=_build_group(grid.movedim(1, -1).reshape(-1, dims.data).tolist()),
        pipeline=_build_group(pipelines.tolist()),
        model=_build_group(grid.movedim(1, 0).reshape(dims.data, -1).tolist()),
        embedding=_build_group(_embedding_ranks(pipelines)),
    )


def _embedding_ranks(pipelines: torch.Tensor) -> list[list[int]]:
    """Pair the ends of each pipeline, ``(pipelines, stages)``; stages between them stay alone."""
    ends = [sorted({row[0], row[-1]}) for row in pipelines.tolist()]
    between = [[rank] for row in pipelines.tolist() for rank in row[1:-1]]
    return ends + between


def _build_group(ranks: list[list[int]]) -> ProcessGroup:
    """Create one group for each list of ``ranks``, which cover the world; return this rank's."""
    group, _ = dist.new_subgroups_by_enumeration(ranks)
    return group
