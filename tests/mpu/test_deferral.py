"""Weight gradients that are put off are those that would have come at once."""

import pytest
import torch

from mpu import PLAIN, ColumnParallelLinear, ParallelDims, build_groups, set_main_grad
from mpu.deferral import DeferringProducts
from tests.distributed import run_ranks


def test_deferred_jobs_add_the_same_gradients() -> None:
    run_ranks(2, check_jobs)


def check_jobs() -> None:
    group = build_groups(ParallelDims(tensor=2)).tensor
    products = DeferringProducts(PLAIN)
    layer = ColumnParallelLinear(6, 8, group=group, products=products, dtype=torch.float64)
    total = torch.zeros_like(layer.weight)
    set_main_grad(layer.weight, total)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    want_weight, want_x, want_bias = total.clone(), x.grad, layer.bias.grad
    assert want_weight.any()

    total.zero_()
    x.grad = layer.bias.grad = None
    with products.deferring() as jobs:
        layer(x).square().sum().backward()
    assert torch.equal(x.grad, want_x)
    assert torch.equal(layer.bias.grad, want_bias)
    assert not total.any()
    (job,) = jobs
    job()
    assert torch.equal(total, want_weight)


def test_weight_without_a_buffer_cannot_wait() -> None:
    products = DeferringProducts(PLAIN)
    x = torch.randn(5, 6)
    assert products.weight_gradient(x, x, None) is not None
    with products.deferring(), pytest.raises(AssertionError, match="nowhere to add"):
        products.weight_gradient(x, x, None)
