"""Tensor parallelism: process groups, collectives with gradients, parallel layers."""

from mpu.cross_entropy import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from mpu.data import broadcast_batch, copy_to_device
from mpu.groups import Axis, ParallelDims, ParallelGroups, build_groups
from mpu.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from mpu.mappings import (
    copy_to_region,
    gather_from_region,
    gather_from_sequence,
    reduce_from_region,
    reduce_scatter_to_sequence,
    scatter_to_region,
    scatter_to_sequence,
)
from mpu.products import PLAIN, Products, set_main_grad
from mpu.rng import RngStreams, dropout, init_normal
from mpu.sharding import (
    Box,
    ShardedTensor,
    ShardSpec,
    mark_whole,
    replace_parameters,
    set_shard_spec,
    shard_spec,
)

__all__ = [
    "Axis",
    "Box",
    "ColumnParallelLinear",
    "PLAIN",
    "ParallelDims",
    "ParallelGroups",
    "Products",
    "RngStreams",
    "RowParallelLinear",
    "ShardSpec",
    "ShardedTensor",
    "VocabParallelEmbedding",
    "broadcast_batch",
    "build_groups",
    "copy_to_device",
    "copy_to_region",
    "dropout",
    "gather_from_region",
    "gather_from_sequence",
    "init_normal",
    "mark_whole",
    "reduce_from_region",
    "reduce_scatter_to_sequence",
    "replace_parameters",
    "scatter_to_region",
    "scatter_to_sequence",
    "set_main_grad",
    "set_shard_spec",
    "shard_spec",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]
