"""The activations of the MLP: BLOOM's GELU with its bias, and the gated units.

A gated unit (Shazeer 2020, arXiv:2002.05202) takes twice the width, cut into halves a and b:

    liglu  a * b        geglu  a * gelu(b)        reglu  a * relu(b)        swiglu  a * silu(b)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.config import Activation
from megatron.model.fusion import fused_on_gpu


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """BLOOM's GELU of ``x + bias``: y / 2 (1 + tanh(0.79788456 y (1 + 0.044715 y^2))).

    Torch's kernel has sqrt(2 / pi) with all its digits. In float64, where the two can be told
    apart, the formula is computed as BLOOM and transformers write it.
    """
    y = x + bias
    if y.dtype == torch.float64:
        return y * 0.5 * (1.0 + torch.tanh(0.79788456 * y * (1 + 0.044715 * y * y)))
    return F.gelu(y, approximate="tanh")


@fused_on_gpu
def activate(x: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """The activation of the MLP, of ``x + bias``.

    ``(*, n)`` -> ``(*, n)``, or ``(*, n / 2)`` for a gated unit, whose halves are this rank's parts
    of a and of b.
    """
    if activation == "gelu":
        return bias_gelu(x, bias)
    a, b = (x + bias).chunk(2, dim=-1)
    return a * _GATES[activation](b)


def _identity(x: Tensor) -> Tensor:
    return x


_GATES: dict[Activation, Callable[[Tensor], Tensor]] = {
    "liglu": _identity,
    "geglu": F.gelu,
    "reglu": F.relu,
    "swiglu": F.silu,
}
