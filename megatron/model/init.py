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
from megatron.model.stages import Stage
from mpu import init_normal, replace_parameters

_RESIDUAL_OUTPUTS = ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")


def build_model(
    config: ModelConfig,
    placement: Placement,
    *,
    device: torch.device,
    backend: Backend,
    recompute: Recompute = "none",
    stage: Stage | None = None,
) -> BloomForPretraining:
    """A model on ``device``, or a stage of it, whose parameters are not initialised yet."""
    with torch.device("meta"):
        model = BloomForPretraining(
            config, placement, stage=stage, backend=backend, recompute=recompute
        )
    if device.type != "meta":
        replace_parameters(
            model, lambda _, old: torch.empty(old.shape, dtype=old.dtype, device=device)
        )
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
    for name, parameter in parameters:
        init_parameter(name, parameter, config, placement, seed=seed)


@torch.no_grad()
def init_parameter(
    name: str, parameter: nn.Parameter, config: ModelConfig, placement: Placement, *, seed: int
) -> None:
    """Give the parameter called ``name`` its initial value."""
    if parameter.dim() == 1:
        parameter.fill_(1 if name.endswith("layernorm.weight") else 0)
        return
    std = config.initial_std
    if name.endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * config.num_layers)
    rank, size = placement.group.rank(), placement.group.size()
    init_normal(parameter, seed=seed, name=name, std=std, rank=rank, size=size)
