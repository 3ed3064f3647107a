"""Tensor parallelism: process groups, collectives with gradients, parallel layers."""

from mpu.groups import ParallelDims, ParallelGroups, build_groups
from mpu.sharding import Piece, ShardSpec, set_shard_spec, shard_spec

__all__ = [
    "ParallelDims",
    "ParallelGroups",
    "Piece",
    "ShardSpec",
    "build_groups",
    "set_shard_spec",
    "shard_spec",
]
