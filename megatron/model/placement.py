"""How the parameters of a model are held, and the layer norms that are held so."""

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megatron.apex import fused_layer_norm
from megatron.config import ModelConfig
from mpu import ShardSpec, set_shard_spec


class LayerOptions(TypedDict):
    """Keyword arguments that every parallel layer takes."""

    group: ProcessGroup
    sequence_parallel: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Placement:
    """How the parameters of a model are held.

    Attributes:
        group: the tensor group.
        sequence_parallel: each rank of it keeps a part of the sequence between parallel layers.
        dtype: of the parameters and the computation.
    """

    group: ProcessGroup
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def layer_options(self) -> LayerOptions:
        return LayerOptions(
            group=self.group,
            sequence_parallel=self.sequence_parallel,
            dtype=self.dtype,
        )


def build_layer_norm(config: ModelConfig, placement: Placement) -> nn.Module:
    """A layer norm over the hidden size, ``(*, hidden)`` -> ``(*, hidden)``."""
    kind = fused_layer_norm() if config.layernorm == "apex" else nn.LayerNorm
    norm: nn.Module = kind(config.hidden_size, eps=config.layernorm_epsilon)
    norm = norm.to(dtype=placement.dtype)
    for parameter in norm.parameters():
        spec = ShardSpec(shape=(config.hidden_size,), sum_gradient=placement.sequence_parallel)
        set_shard_spec(parameter, spec)
    return norm
