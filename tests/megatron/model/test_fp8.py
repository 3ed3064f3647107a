"""Products in fp8 against exact ones, by the error that rounding to 8 bits can make.

A number of e4m3 has 3 bits after the leading one, so that rounding changes it by at most a part of
2^-4, one of e5m2 by 2^-3, or, for numbers too small for a leading one, by half of the smallest step
of the format. A product of matrices is compared with the sum of the errors of all its terms.
"""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.config import Config, ModelConfig, ParallelConfig, TrainConfig
from megatron.errors import ConfigError
from megatron.model.fp8 import Fp8Products, check_capability, fp8_products
from megatron.model.placement import build_placement
from mpu import (
    PLAIN,
    ColumnParallelLinear,
    ParallelDims,
    Products,
    RowParallelLinear,
    build_groups,
    set_main_grad,
)
from tests.distributed import run_ranks
from tests.figures import Figure

pytest.importorskip("torchao", reason="torchao, of the extra fp8, is not installed")

CPU = torch.device("cpu")
BATCH, SEQ, IN, OUT = 2, 16, 64, 48

# Largest relative error, smallest step and largest number of the two formats.
E4M3 = (2**-4, 2**-9, 448)
E5M2 = (2**-3, 2**-16, 57344)


@pytest.fixture
def operands() -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and gradient, of very different sizes."""
    x = torch.randn(BATCH, SEQ, IN) * 20
    weight = torch.randn(OUT, IN) * 0.02
    grad = torch.randn(BATCH, SEQ, OUT) * 1e-6
    return x.bfloat16(), weight.bfloat16(), grad.bfloat16()


def all_products(
    products: Products, x: Tensor, weight: Tensor, grad: Tensor
) -> dict[str, Tensor | None]:
    prepared = products.prepare(grad)
    return {
        "output": products.output(x, weight, None),
        "input gradient": products.input_gradient(prepared, weight),
        "weight gradient": products.weight_gradient(prepared, x, None),
    }


def error_bound(x: Tensor, kind: tuple[float, float, float]) -> Tensor:
    """How far rounding can move each number of ``x``."""
    relative, step, largest = kind
    return torch.maximum(relative * x.abs(), step / 2 * x.abs().max() / largest)


def check_product(
    got: Tensor | None,
    left: tuple[Tensor, tuple[float, float, float]],
    right: tuple[Tensor, tuple[float, float, float]],
) -> float:
    """Compare with the product of the two matrices; the error as a share of what is allowed."""
    (a, a_kind), (b, b_kind) = ((x.double(), kind) for x, kind in (left, right))
    a_error, b_error = error_bound(a, a_kind), error_bound(b, b_kind)
    allowed = a_error @ b.abs() + a.abs() @ b_error + a_error @ b_error
    want = a @ b
    assert got is not None
    assert got.dtype == torch.bfloat16
    error = (got.double().view(want.shape) - want).abs() - 2**-8 * want.abs()
    return (error / allowed).max().item()


def test_products_are_within_rounding(
    operands: tuple[Tensor, Tensor, Tensor], figure: Figure
) -> None:
    x, weight, grad = operands
    found = all_products(fp8_products(CPU), x, weight, grad)
    rows, grads = x.flatten(0, 1), grad.flatten(0, 1)
    shares = {
        "output": check_product(found["output"], (rows, E4M3), (weight.t(), E4M3)),
        "input": check_product(found["input gradient"], (grads, E5M2), (weight, E4M3)),
        "weight": check_product(found["weight gradient"], (grads.t(), E5M2), (rows, E4M3)),
    }
    figure("fp8 products, share of the error that rounding allows", **shares)
    assert max(shares.values()) <= 1
    # More than bfloat16 rounds: the numbers were rounded to 8 bits.
    assert min(shares.values()) > 0.05


def test_emulation_equals_the_operator_of_gpus(operands: tuple[Tensor, Tensor, Tensor]) -> None:
    emulated = all_products(Fp8Products(emulate=True), *operands)
    real = all_products(Fp8Products(emulate=False), *operands)
    for name, want in emulated.items():
        # The sums of one product may be in another order: a step of bfloat16 at most.
        torch.testing.assert_close(real[name], want, rtol=2**-7, atol=0, msg=name)


def test_compiled_products_equal_uncompiled_ones(
    operands: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Fp8Products(emulate=False)
    # As on a GPU, but without a compiler for C++.
    compiling = partial(torch.compile, dynamic=False, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr("megatron.model.fp8.fused_on_gpu", compiling)
    compiled = Fp8Products(emulate=False)
    want, got = (all_products(products, *operands) for products in (plain, compiled))
    for name in want:
        assert torch.equal(got[name], want[name]), name  # type: ignore[arg-type]


def test_bias_is_added_in_full_precision(operands: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _ = operands
    products, bias = fp8_products(CPU), torch.randn(OUT).bfloat16()
    without = products.output(x, weight, None)
    assert torch.equal(products.output(x, weight, bias), without + bias)


def test_zeros_give_zeros() -> None:
    x, weight = torch.zeros(1, 16, 32).bfloat16(), torch.randn(16, 32).bfloat16()
    assert fp8_products(CPU).output(x, weight, None).count_nonzero() == 0


@pytest.mark.parametrize("sequence", [False, True])
def test_gradients_of_layers_reach_inputs_and_buffers(sequence: bool) -> None:
    run_ranks(2, check_gradients, sequence)


def check_gradients(sequence: bool) -> None:
    group = build_groups(ParallelDims(tensor=2)).tensor
    results = []
    for products in (PLAIN, fp8_products(CPU)):
        torch.manual_seed(1)
        options = {"group": group, "sequence_parallel": sequence, "dtype": torch.bfloat16}
        up = ColumnParallelLinear(IN, 2 * OUT, products=products, **options)  # type: ignore[arg-type]
        down = RowParallelLinear(2 * OUT, IN, products=products, **options)  # type: ignore[arg-type]
        weights = (up.weight, down.weight)
        buffers = [torch.ones(weight.shape) for weight in weights]
        for weight, buffer in zip(weights, buffers, strict=True):
            set_main_grad(weight, buffer)
        x = torch.randn(BATCH, SEQ, IN).bfloat16().requires_grad_()
        y = down(up(x).tanh())
        y.square().sum().backward()
        assert up.weight.grad is None
        assert down.weight.grad is None
        assert x.grad is not None
        # What was in the buffers stays.
        results.append([y.detach(), x.grad, *(buffer - 1 for buffer in buffers)])
    for plain, fp8 in zip(*results, strict=True):
        assert fp8.dtype == plain.dtype
        error = (fp8.double() - plain.double()).norm() / plain.double().norm()
        assert 0.01 < error < 0.15


def make_config(**changes: object) -> Config:
    return Config(
        folder=Path("run"),
        model=ModelConfig(num_layers=1, hidden_size=32, num_heads=2, vocab_size=11, seq_length=16),
        train=TrainConfig(samples=4, global_batch_size=4, dtype="bf16", **changes),  # type: ignore[arg-type]
        parallel=ParallelConfig(),
    )


def test_products_of_a_model_are_those_of_its_config() -> None:
    run_ranks(1, check_placement)


def check_placement() -> None:
    group = build_groups(ParallelDims()).tensor
    assert build_placement(make_config(), group, CPU).products is PLAIN
    placement = build_placement(make_config(fp8=True), group, CPU)
    assert isinstance(placement.products, Fp8Products)
    assert placement.linear_options["products"] is placement.products
    assert "products" not in placement.layer_options


def test_missing_torchao_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8.config", None)
    with pytest.raises(
        ConfigError, match=r"train.fp8 needs torchao: pip install -c constraints.txt -e \.\[fp8\]"
    ):
        fp8_products(CPU)


def test_old_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compute capability 8\.9 or above, got 8\.0"):
        check_capability((8, 0))
    for capability in ((8, 9), (9, 0), (10, 0)):
        check_capability(capability)
