"""Fused chains compute what their operations do, dropout included."""

import shutil

import pytest
import torch
from torch import Tensor

from megatron.model.activations import activate
from megatron.model.fusion import bias_dropout_add
from mpu import RngStreams

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiles for the CPU")


def test_bias_dropout_add_is_its_formula() -> None:
    x, bias, residual = torch.randn(2, 5, 8), torch.randn(8), torch.randn(2, 5, 8)
    assert torch.equal(bias_dropout_add(x, bias, residual, 0.5, None), residual + (x + bias))
    keys = RngStreams(1, torch.arange(2)).keys(3, axes=[range(5)])
    y = bias_dropout_add(x, bias, residual, 0.5, keys) - residual
    kept = y.abs() > 1e-5
    torch.testing.assert_close(y[kept], 2 * (x + bias)[kept])
    assert 0.2 < kept.float().mean() < 0.8


@needs_compiler
def test_compiled_chains_equal_their_operations() -> None:
    keys = RngStreams(1, torch.arange(2)).keys(3, axes=[range(5)])

    def chain(x: Tensor, bias: Tensor) -> Tensor:
        return bias_dropout_add(activate(x, bias, "gelu"), bias, x, 0.3, keys)

    x, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 64), (64,)))
    results = []
    for function in (chain, torch.compile(chain, dynamic=False)):
        y = function(x, bias)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, bias))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
