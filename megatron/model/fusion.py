"""Chains of element-wise operations, fused into one kernel on a GPU.

    activations.activate    gelu(x + bias), or a gated unit
    bias_dropout_add        residual + dropout(x + bias)

Run one by one, each operation reads and writes the whole tensor; compiled, a chain does so once,
and the random bits of dropout are never in memory. On a CPU the operations run as they are: there
the compiler would need one for C++.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

from mpu import dropout

P = ParamSpec("P")


def fused_on_gpu(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Compile ``function``, at its first call with a tensor on a GPU as first argument."""

    @cache
    def compiled() -> Callable[P, Tensor]:
        return torch.compile(function, dynamic=False)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        first = args[0]
        assert isinstance(first, Tensor)
        return (compiled() if first.is_cuda else function)(*args, **kwargs)

    return call


@fused_on_gpu
def bias_dropout_add(
    x: Tensor, bias: Tensor, residual: Tensor, p: float, keys: Tensor | None
) -> Tensor:
    """``residual + dropout(x + bias)``, of ``(b, s, h)``; ``keys`` ``(b, s)``, or no dropout."""
    y = x + bias
    if keys is not None:
        y = dropout(y, p, keys)
    return residual + y
