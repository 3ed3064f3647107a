"""How the parameters of a model are held, and the layer norms that are held so."""

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megatron.apex import fused_layer_norm
from megatron.config import Config, ModelConfig
from megatron.errors import ConfigError
from megatron.model.fp8 import fp8_products
from mpu import PLAIN, Products, mark_whole


class LayerOptions(TypedDict):
    """Keyword arguments that every parallel layer takes."""

    group: ProcessGroup
    sequence_parallel: bool
    dtype: torch.dtype


class LinearOptions(LayerOptions):
    """Keyword arguments of the linear layers of the transformer."""

    symmetric_memory: bool
    products: Products


@dataclass(frozen=True)
class Placement:
    """How the parameters of a model are held, and multiplied with.

    Attributes:
        group: the tensor group.
        sequence_parallel: each rank of it keeps a part of the sequence between parallel layers.
        dtype: of the parameters and the computation.
        symmetric_memory: the transformer's linear layers communicate beside their products.
        products: of these layers.
    """

    group: ProcessGroup
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32
    symmetric_memory: bool = False
    products: Products = PLAIN

    @property
    def layer_options(self) -> LayerOptions:
        return LayerOptions(
            group=self.group,
            sequence_parallel=self.sequence_parallel,
            dtype=self.dtype,
        )

    @property
    def linear_options(self) -> LinearOptions:
        return LinearOptions(
            **self.layer_options,
            symmetric_memory=self.symmetric_memory,
            products=self.products,
        )


def build_placement(config: Config, group: ProcessGroup, device: torch.device) -> Placement:
    """What ``config`` says of a model on ``device``.

    Raises:
        ConfigError: for an option that the device or the installation cannot do.
    """
    parallel = config.parallel
    if parallel.symmetric_memory and device.type != "cuda":
        raise ConfigError(
            f"parallel.symmetric_memory needs GPUs; the device is {device.type}",
            on_every_rank=True,
        )
    return Placement(
        group,
        sequence_parallel=parallel.sequence,
        dtype=config.train.torch_dtype,
        symmetric_memory=parallel.symmetric_memory,
        products=fp8_products(device) if config.train.fp8 else PLAIN,
    )


def build_layer_norm(config: ModelConfig, placement: Placement) -> nn.Module:
    """A layer norm over the hidden size, ``(*, hidden)`` -> ``(*, hidden)``."""
    kind = fused_layer_norm() if config.layernorm == "apex" else nn.LayerNorm
    norm: nn.Module = kind(config.hidden_size, eps=config.layernorm_epsilon)
    norm = norm.to(dtype=placement.dtype)
    mark_whole(norm, sum_gradient=placement.sequence_parallel)
    return norm
