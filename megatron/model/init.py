"""The initial value of every parameter, in one table.

    parameter                                     value
    biases                                        0
    layer norms                                   weight 1, bias 0
    self_attention.dense.weight                   N(0, std / sqrt(2 L))
    mlp.dense_4h_to_h.weight                      N(0, std / sqrt(2 L))
    every other weight                            N(0, std)

with L layers and ``model.init_std``. The two exceptions end the residual branches, whose sum would
otherwise grow with the depth (Radford et al. 2019). Values depend on the seed, the name of the
parameter and the position in it, not on how the model is spread over ranks; padding is zero.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from megatron.config import Backend, ModelConfig, Recompute
from megatron.model.language_model import BloomForPretraining
from megatron.model.placement import Placement
from mpu import init_normal, set_shard_spec, shard_spec

_RESIDUAL_OUTPUTS = ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")


def build_model(
    config: ModelConfig,
    placement: Placement,
    *,
    device: torch.device,
    backend: Backend,
    recompute: Recompute = "none",
) -> BloomForPretraining:
    """A model on ``device`` whose parameters are not initialised yet."""
    with torch.device("meta"):
        model = BloomForPretraining(config, placement, backend=backend, recompute=recompute)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            real = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device))
            set_shard_spec(real, shard_spec(parameter))
            module.register_parameter(name, real)
    return model


@torch.no_grad()
def init_parameters(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: ModelConfig,
    placement: Placement,
    *,
    seed: int,
) -> None:
    """Give named parameters, of a model or copies of them, their initial value."""
    rank, size = placement.group.rank(), placement.group.size()
    for name, parameter in parameters:
        if parameter.dim() == 1:
            parameter.fill_(1 if name.endswith("layernorm.weight") else 0)
            continue
        std = config.initial_std
        if name.endswith(_RESIDUAL_OUTPUTS):
            std /= math.sqrt(2 * config.num_layers)
        init_normal(parameter, seed=seed, name=name, std=std, rank=rank, size=size)
