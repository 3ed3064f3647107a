"""Products of the linear layers in 8-bit floating point, by torchao's blocks for training.

    product              left              right
    output               input     e4m3    weight    e4m3
    gradient of input    gradient  e5m2    weight    e4m3
    gradient of weight   gradient  e5m2    input     e4m3

Each operand is scaled so that its largest number becomes the largest of the format, and rounded to
8 bits; their product adds up in float32, is divided by both scales and rounded to bfloat16. What is
kept stays what it is: activations in bfloat16, main weights and their gradients in float32. GPUs
multiply 8-bit numbers twice as fast as bfloat16; on a CPU torchao emulates the rounding only.

A scale belongs to the numbers that one rank multiplies: all of an input that the ranks share, its
own part of a weight or of a cut input. With another tensor size the scales are others, and so is
the rounding: this is the one option with which the layout changes the result, by as much as fp8
rounds.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.model.fusion import fused_on_gpu
from mpu import Products

logger = logging.getLogger(__name__)

_LEAST_CAPABILITY = (8, 9)


def fp8_products(device: torch.device) -> Products:
    """The products of linear layers on ``device``; on a CPU, an emulation of them.

    Raises:
        ConfigError: if torchao is not installed, or the GPU does not know fp8.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        check_capability(torch.cuda.get_device_capability(device))
    else:
        logger.warning("train.fp8 on a CPU has the rounding of fp8 without its speed")
    return Fp8Products(emulate=not on_gpu)


def check_capability(capability: tuple[int, int]) -> None:
    """Refuse a GPU of a compute capability that has no products in fp8.

    Raises:
        ConfigError: naming what it needs and what it got.
    """
    if capability < _LEAST_CAPABILITY:
        least, got = (".".join(map(str, numbers)) for numbers in (_LEAST_CAPABILITY, capability))
        raise ConfigError(
            f"train.fp8 needs a GPU of compute capability {least} or above, got {got}",
            on_every_rank=True,
        )


class Fp8Products:
    """``mpu.Products`` in fp8; input and weight of bfloat16, or what else is to be rounded.

    Args:
        emulate: multiply the rounded numbers in float32.

    Raises:
        ConfigError: if torchao is not installed.
    """

    def __init__(self, *, emulate: bool) -> None:
        cast = _casts(emulate)
        # Compiled, a cast is a part of the kernel that reads its operand, or lays it out anew.
        self._output = fused_on_gpu(lambda x, w: torch.mm(cast["input"](x), cast["weight"](w).t()))
        self._prepare = fused_on_gpu(lambda g: cast["gradient"](g))
        self._input = fused_on_gpu(lambda g, w: torch.mm(g, cast["weight"](w)))
        self._weight = fused_on_gpu(lambda g, x: torch.mm(g.t(), cast["input"](x)))

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = self._output(_rows(x), weight.detach()).view(*x.shape[:-1], -1)
        return y if bias is None else y.add_(bias)

    def prepare(self, grad: Tensor) -> Tensor:
        return self._prepare(grad.contiguous())

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        return self._input(_rows(grad), weight.detach()).view(*grad.shape[:-1], -1)

    def weight_gradient(self, grad: Tensor, x: Tensor, total: Tensor | None) -> Tensor | None:
        product = self._weight(_rows(grad), _rows(x))
        if total is None:
            return product
        total.add_(product)
        return None


def _rows(x: Tensor) -> Tensor:
    """``(*, n)`` -> ``(rows, n)``, detached: what is compiled serves with and without gradients."""
    return x.detach().reshape(-1, x.size(-1))


def _casts(emulate: bool) -> dict[str, Callable[[Tensor], Any]]:
    """Torchao's conversions of the three kinds of operands to its tensors of 8-bit numbers."""
    try:
        from torchao.float8.config import e4m3_dtype, e5m2_dtype
        from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
        from torchao.float8.float8_training_tensor import (
            GemmInputRole,
            LinearMMConfig,
            ScaledMMConfig,
        )
    except ImportError as error:
        raise ConfigError(
            f"train.fp8 needs torchao: pip install -c constraints.txt -e .[fp8] ({error})"
        ) from error
    products = LinearMMConfig()
    if emulate:
        products = LinearMMConfig(*(ScaledMMConfig(emulate=True) for _ in products))
    kinds = {
        "input": (e4m3_dtype, GemmInputRole.INPUT),
        "weight": (e4m3_dtype, GemmInputRole.WEIGHT),
        "gradient": (e5m2_dtype, GemmInputRole.GRAD_OUTPUT),
    }
    return {
        name: partial(
            hp_tensor_to_float8_dynamic,
            float8_dtype=dtype,
            linear_mm_config=products,
            gemm_input_role=role,
        )
        for name, (dtype, role) in kinds.items()
    }
