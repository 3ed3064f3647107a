"""BLOOM's GELU and the gated units, against their formulas in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.config import Activation
from megatron.model.activations import activate, bias_gelu


def erf_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


GATES: dict[Activation, Callable[[Tensor], Tensor]] = {
    "liglu": lambda x: x,
    "geglu": erf_gelu,
    "reglu": lambda x: x.clamp(min=0),
    "swiglu": lambda x: x / (1 + torch.exp(-x)),
}


def bloom_gelu(y: Tensor) -> Tensor:
    """The formula as BLOOM writes it."""
    return y / 2 * (1 + torch.tanh(0.79788456 * (y + 0.044715 * y**3)))


def bloom_gelu_slope(y: Tensor) -> Tensor:
    """Its derivative, as the original computes it."""
    t = torch.tanh(0.79788456 * y * (1 + 0.044715 * y * y))
    inner = 0.5 * y * (1 - t * t) * (0.79788456 + 0.1070322243 * y * y)
    return inner + 0.5 * (1 + t)


def test_gelu_is_blooms_formula_in_float64() -> None:
    x, bias = 3 * torch.randn(50, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(bias_gelu(x, bias), bloom_gelu(x + bias), rtol=0, atol=1e-14)


def test_gradient_of_gelu_is_blooms_formula() -> None:
    x = (3 * torch.randn(50, 7, dtype=torch.float64)).requires_grad_()
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(50, 7, dtype=torch.float64)
    dx, dbias = torch.autograd.grad(bias_gelu(x, bias), (x, bias), grad)
    want = grad * bloom_gelu_slope((x + bias).detach())
    # The original's constant 0.1070322243 is rounded to ten digits.
    torch.testing.assert_close(dx, want, rtol=0, atol=1e-8)
    torch.testing.assert_close(dbias, want.sum(0), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2**-22), (torch.bfloat16, 2**-8)])
def test_gelu_of_low_precision_is_near_the_formula(dtype: torch.dtype, bound: float) -> None:
    x, bias = (3 * torch.randn(50, 7)).to(dtype), torch.randn(7).to(dtype)
    got = bias_gelu(x, bias)
    assert got.dtype == dtype
    y = (x + bias).double()
    # Where 1 + tanh cancels, the error is one of its parts, and not of the small result.
    assert ((got.double() - bloom_gelu(y)).abs() <= bound * y.abs()).all()


@pytest.mark.parametrize("activation", GATES)
def test_gated_unit_multiplies_the_first_half_by_the_gated_second(activation: Activation) -> None:
    x, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    a, b = (x + bias)[:, :3], (x + bias)[:, 3:]
    got = activate(x, bias, activation)
    torch.testing.assert_close(got, a * GATES[activation](b), rtol=0, atol=1e-14)


def test_gelu_keeps_the_width() -> None:
    x, bias = torch.randn(5, 6), torch.randn(6)
    assert torch.equal(activate(x, bias, "gelu"), bias_gelu(x, bias))
