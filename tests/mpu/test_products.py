"""Gradients that are added in place, and products of low precision on a CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import mpu.products
from mpu import (
    ColumnParallelLinear,
    ParallelDims,
    RowParallelLinear,
    VocabParallelEmbedding,
    build_groups,
    set_main_grad,
    vocab_parallel_linear_cross_entropy,
)
from mpu.products import add_product, linear, matmul
from tests.distributed import run_ranks

VOCAB, SIZE = 21, 8


class Network(nn.Module):
    """An embedding, two linear layers, and the embedding again as head."""

    def __init__(self, dtype: torch.dtype, *, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        group = build_groups(ParallelDims(tensor=torch.distributed.get_world_size())).tensor
        self.group = group
        self.embedding = VocabParallelEmbedding(VOCAB, SIZE, group=group, dtype=dtype)
        self.up = ColumnParallelLinear(SIZE, 12, group=group, dtype=dtype)
        self.down = RowParallelLinear(12, SIZE, group=group, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        hidden = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        weights = torch.ones(tokens.shape, dtype=torch.float64)
        head = self.embedding.weight
        return vocab_parallel_linear_cross_entropy(
            hidden, head, tokens, weights, group=self.group, vocab_size=VOCAB, chunk_tokens=3
        )

    def block(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).relu())
        return y


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tensor", [1, 2])
def test_gradients_in_place_equal_those_of_autograd(tensor: int, recompute: bool) -> None:
    run_ranks(tensor, check_in_place, recompute)


def check_in_place(recompute: bool) -> None:
    tokens = torch.tensor([[3, 0, 20, 3], [7, 7, 1, 19]])
    network = Network(torch.float64, recompute=recompute)
    (2 * network(tokens)).backward()
    want = {name: parameter.grad for name, parameter in network.named_parameters()}

    network.zero_grad()
    buffers = {}
    for name, parameter in network.named_parameters():
        # What is there already stays.
        buffers[name] = torch.ones_like(parameter)
        set_main_grad(parameter, buffers[name])
    (2 * network(tokens)).backward()
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter.grad, want[name]), name
            continue
        assert parameter.grad is None, name
        torch.testing.assert_close(buffers[name] - 1, want[name], rtol=1e-12, atol=1e-14)


FROZEN = [
    ("embedding",),
    ("up.weight", "down.bias"),
    ("up", "down"),
    ("embedding", "up.weight", "down"),
]


@pytest.mark.parametrize(
    ("frozen", "recompute"), [(names, names[0] != "up") for names in FROZEN], ids=str
)
def test_frozen_parameters_get_no_gradient_and_cost_no_product(
    frozen: tuple[str, ...], recompute: bool
) -> None:
    run_ranks(2, check_frozen, frozen, recompute)


def check_frozen(frozen: tuple[str, ...], recompute: bool) -> None:
    tokens = torch.tensor([[3, 0, 20, 3], [7, 7, 1, 19]])
    network = Network(torch.float64, recompute=recompute)
    network(tokens).backward()
    want = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad()
    buffers = {}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
        buffers[name] = torch.zeros_like(parameter)
        set_main_grad(parameter, buffers[name])
    products = 0

    def count(*args: object) -> None:
        nonlocal products
        products += 1
        add_product(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mpu.products, "add_product", count)
        network(tokens).backward()
    assert products == sum(not f"{name}.weight".startswith(frozen) for name in ("up", "down"))
    for name, parameter in network.named_parameters():
        got = buffers[name] if parameter.grad is None else parameter.grad
        expected = want[name] if parameter.requires_grad else torch.zeros_like(parameter)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("most_bytes", [mpu.products._WEIGHT_BYTES, 4 * 5 * 4, 1])
def test_in_place_sums_are_of_the_buffers_precision(
    most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpu.products, "_WEIGHT_BYTES", most_bytes)
    grad, x = torch.randn(64, 6).bfloat16(), torch.randn(64, 5).bfloat16()
    total = torch.zeros(6, 5)
    for _ in range(100):
        add_product(total, grad, x)
    want = 100 * grad.double().t() @ x.double()
    # Each product may be rounded to bfloat16, but not their sum.
    torch.testing.assert_close(total.double(), want, rtol=2**-8, atol=2**-6)


@pytest.mark.parametrize("converts", [False, True])
def test_low_precision_products_are_within_rounding(
    converts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpu.products, "_multiplies_float32_faster", lambda: converts)
    x, weight = torch.randn(3, 7, 40).bfloat16(), torch.randn(9, 40).bfloat16()
    bias = torch.randn(9).bfloat16()
    for got, want in (
        (linear(x, weight, bias), x.double() @ weight.double().t() + bias.double()),
        (matmul(x, weight.t()), x.double() @ weight.double().t()),
    ):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=2**-6)


def test_full_precision_is_never_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpu.products, "_multiplies_float32_faster", lambda: True)
    x, weight = torch.randn(5, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(linear(x, weight), x @ weight.t())


@pytest.mark.parametrize("onednn", [False, True])
def test_float32_products_are_within_rounding_by_either_library(
    onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpu.products, "_has_faster_onednn", lambda: onednn)
    weight, bias = torch.randn(9, 40), torch.randn(9)
    whole = torch.randn(50, 3, 40)
    # As they come: from a transposition, from the gradient of a sum, too few rows for oneDNN.
    for x in (whole, whole.transpose(0, 1), whole[:1, :1].expand(3, 50, 40), whole[:2]):
        want = x.double() @ weight.double().t()
        torch.testing.assert_close(matmul(x, weight.t()).double(), want, rtol=1e-5, atol=1e-5)
        want += bias.double()
        torch.testing.assert_close(linear(x, weight, bias).double(), want, rtol=1e-5, atol=1e-5)


def test_compiled_products_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpu.products, "_has_faster_onednn", lambda: True)
    operations: list[str] = []

    def backend(module: GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        operations.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    x, weight = torch.randn(200, 40), torch.randn(9, 40)
    compiled = torch.compile(lambda: linear(x, weight).relu(), backend=backend)
    torch.testing.assert_close(compiled(), linear(x, weight).relu())
    assert any("linear" in name for name in operations), operations
    assert not any("mkldnn" in name for name in operations), operations
