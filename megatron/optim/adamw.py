"""AdamW over the main parameters, with its state made at once and open to be saved."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron.apex import fused_adam
from megatron.config import OptimizerConfig
from megatron.optim.parameters import Parameters

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The optimizer state of a parameter, besides its number of steps."""


def build_adamw(parameters: Parameters, config: OptimizerConfig) -> Optimizer:
    """Decoupled weight decay (Loshchilov and Hutter 2019) on matrices, none on biases and norms.

    Raises:
        ConfigError: if apex is asked for and not there.
    """
    decayed, others = parameters.main()
    # A rank may hold nothing of one kind, or nothing at all.
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    optimizer: Optimizer
    if config.name == "apex_adamw":
        optimizer = fused_adam()(groups, **options)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **options)
    for main in (*decayed, *others):
        optimizer.state[main] = {name: torch.zeros_like(main) for name in MOMENTS}
    set_step(optimizer, 0)
    return optimizer


def update(optimizer: Optimizer, lr: float, skip: Tensor) -> None:
    """Make one update with the learning rate ``lr``, or none if ``skip`` is 1.

    Args:
        skip: float32 scalar on the device of the parameters, 0 or 1. Torch's kernel looks at it
            there, so that nobody waits for its value; for apex it has to be read.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip:
        optimizer.step()


def set_step(optimizer: Optimizer, step: int) -> None:
    """Say how many updates the moments hold, which the bias correction depends on."""
    if isinstance(optimizer, torch.optim.AdamW):
        for parameter, state in optimizer.state.items():
            state["step"] = torch.full((), step, dtype=torch.float32, device=parameter.device)
    else:
        # Apex counts once for each group of parameters.
        for group in optimizer.param_groups:
            group["step"] = step


def moment(optimizer: Optimizer, parameter: nn.Parameter, name: str) -> Tensor:
    """The moment ``name`` of ``parameter``."""
    tensor: Tensor = optimizer.state[parameter][name]
    return tensor
