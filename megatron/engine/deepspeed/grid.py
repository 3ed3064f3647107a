"""The rank grid in DeepSpeed's words: what it calls mpu, and in a pipeline the grid.

DeepSpeed would make process groups of its own. This hands it those that are there.
"""

import torch.distributed as dist
from torch.distributed import ProcessGroup

from mpu import ParallelGroups


class Grid:
    """The groups and ranks of this process, by the names that DeepSpeed 0.19 asks for.

    "Model" stands for tensor x pipeline, "slice" for tensor.
    """

    def __init__(self, groups: ParallelGroups) -> None:
        self._groups = groups
        self.data_parallel_id = groups.data.rank()
        self.data_parallel_size = groups.data.size()
        self.pipe_parallel_size = groups.pipeline.size()
        self.model_parallel_size = groups.tensor.size()
        self.pp_group = dist.get_process_group_ranks(groups.pipeline)

    def get_global_rank(self) -> int:
        return dist.get_rank()

    def get_stage_id(self) -> int:
        return self._groups.pipeline.rank()

    def stage_to_global(self, stage_id: int) -> int:
        return self.pp_group[stage_id]

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._groups.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._groups.data)

    def get_data_parallel_rank(self) -> int:
        return self._groups.data.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._groups.data.size()

    def get_model_parallel_group(self) -> ProcessGroup:
        return self._groups.model

    def get_model_parallel_rank(self) -> int:
        return self._groups.model.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._groups.model.size()

    def get_tensor_model_parallel_group(self) -> ProcessGroup:
        return self._groups.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return self._groups.tensor.rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._groups.tensor.size()

    def get_slice_parallel_group(self) -> ProcessGroup:
        return self._groups.tensor

    def get_slice_parallel_rank(self) -> int:
        return self._groups.tensor.rank()

    def get_slice_parallel_world_size(self) -> int:
        return self._groups.tensor.size()

    def get_pipe_parallel_group(self) -> ProcessGroup:
        return self._groups.pipeline

    def get_pipe_parallel_rank(self) -> int:
        return self._groups.pipeline.rank()

    def get_pipe_parallel_world_size(self) -> int:
        return self._groups.pipeline.size()
