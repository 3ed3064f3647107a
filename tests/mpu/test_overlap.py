"""Layers that communicate beside their products: what they compute, and what they call.

The operators run as torch defines them by collectives and products, on a CPU; see ``symmetric``.
"""

from collections import Counter
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from mpu import (
    ColumnParallelLinear,
    ParallelDims,
    RowParallelLinear,
    ShardSpec,
    build_groups,
    set_main_grad,
)
from mpu.products import PlainProducts
from tests.distributed import run_ranks
from tests.figures import Figure
from tests.mpu.symmetric import operators_on_cpu
from tests.mpu.test_layers import BATCH, IN, OUT, SEQ, X_SHAPE, check_linear, sequence_part

GATHER, REDUCE_SCATTER = "fused_all_gather_matmul", "fused_matmul_reduce_scatter"
OVERLAP: dict[str, Any] = {"sequence_parallel": True, "symmetric_memory": True}
COLUMN_CASES: list[dict[str, Any]] = [
    OVERLAP,
    {**OVERLAP, "bias": False},
    {**OVERLAP, "gather_output": True},
    {**OVERLAP, "skip_bias_add": True},
    {**OVERLAP, "num_blocks": 2, "bias": False},
]
ROW_CASES: list[dict[str, Any]] = [
    OVERLAP,
    {**OVERLAP, "bias": False},
    {**OVERLAP, "skip_bias_add": True},
    {**OVERLAP, "input_is_parallel": False},
]


class Operators(TorchDispatchMode):
    """Counts calls of the operators and, outside of them, of collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("symm_mem", "c10d", "_c10d_functional"):
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_layers_match_one_rank(tensor: int) -> None:
    run_ranks(tensor, check_layers, tensor)


@operators_on_cpu()
def check_layers(tensor: int) -> None:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    for options in COLUMN_CASES:
        outputs = ShardSpec((BATCH, SEQ, OUT), dim=2, blocks=options.get("num_blocks", 1))
        check_linear(
            ColumnParallelLinear(IN, OUT, group=group, dtype=torch.float64, **options),
            group,
            x_spec=sequence_part(X_SHAPE, options),
            y_spec=ShardSpec(outputs.shape) if options.get("gather_output") else outputs,
            case=f"column {options}",
        )
    for options in ROW_CASES:
        is_cut = options.get("input_is_parallel", True)
        check_linear(
            RowParallelLinear(IN, OUT, group=group, dtype=torch.float64, **options),
            group,
            x_spec=ShardSpec(X_SHAPE, dim=2 if is_cut else None),
            y_spec=sequence_part((BATCH, SEQ, OUT), options),
            case=f"row {options}",
        )


class Block(nn.Module):
    """Two layers as an MLP has them, ``(b, s / t, IN)`` -> ``(b, s / t, IN)``."""

    def __init__(self, group: ProcessGroup, *, symmetric_memory: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        options: dict[str, Any] = {
            "group": group,
            "sequence_parallel": True,
            "symmetric_memory": symmetric_memory,
            "dtype": torch.float64,
        }
        self.up = ColumnParallelLinear(IN, OUT, **options)
        self.down = RowParallelLinear(OUT, IN, **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).tanh())
        return y


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("tensor", [2, 4])
def test_block_matches_the_ordinary_one(tensor: int, in_place: bool, figure: Figure) -> None:
    differences = run_ranks(tensor, largest_difference, tensor, in_place)
    figure("symmetric memory against collectives", difference=max(differences))
    assert max(differences) < 1e-12


@operators_on_cpu()
def largest_difference(tensor: int, in_place: bool) -> float:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    x = torch.randn(BATCH, SEQ // tensor, IN, dtype=torch.float64)
    ordinary, overlapping = (
        run_block(Block(group, symmetric_memory=overlaps), x, in_place)
        for overlaps in (False, True)
    )
    assert ordinary.keys() == overlapping.keys()
    return max((ordinary[name] - overlapping[name]).abs().max().item() for name in ordinary)


def run_block(block: Block, x: Tensor, in_place: bool) -> dict[str, Tensor]:
    """Output and all gradients; with ``in_place``, those of weights where they are added."""
    buffers = {}
    if in_place:
        for name, parameter in block.named_parameters():
            if parameter.dim() == 2:
                buffers[name] = torch.ones_like(parameter)
                set_main_grad(parameter, buffers[name])
    leaf = x.clone().requires_grad_()
    y = block(leaf)
    y.square().sum().backward()
    found = {"output": y.detach(), "input": leaf.grad, **buffers}
    for name, parameter in block.named_parameters():
        assert (parameter.grad is None) == (name in buffers), name
        found.setdefault(name, parameter.grad)
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def test_each_pass_of_a_layer_is_one_operator() -> None:
    run_ranks(2, check_operators)


@operators_on_cpu()
def check_operators() -> None:
    group = build_groups(ParallelDims(tensor=2)).tensor
    block = Block(group, symmetric_memory=True)
    x = torch.randn(BATCH, SEQ // 2, IN, dtype=torch.float64, requires_grad=True)
    with Operators() as forward:
        y = block(x)
    with Operators() as backward:
        y.sum().backward()
    # Forward, columns gather and rows reduce; backward, the other way about. What the operators
    # call inside is not seen here; there is no collective beside them.
    assert forward.calls == {GATHER: 1, REDUCE_SCATTER: 1}
    assert backward.calls == {GATHER: 1, REDUCE_SCATTER: 1}


class Recording(PlainProducts):
    """Notes the shapes that weight gradients are computed from."""

    def __init__(self) -> None:
        self.shapes: list[tuple[torch.Size, torch.Size]] = []

    def weight_gradient(self, grad: Tensor, x: Tensor, total: Tensor | None) -> Tensor | None:
        self.shapes.append((grad.shape, x.shape))
        return super().weight_gradient(grad, x, total)


def test_weight_gradients_are_products_of_the_layers() -> None:
    run_ranks(2, check_weight_gradients)


@operators_on_cpu()
def check_weight_gradients() -> None:
    group = build_groups(ParallelDims(tensor=2)).tensor
    products = Recording()
    column = ColumnParallelLinear(IN, OUT, group=group, products=products, **OVERLAP)
    row = RowParallelLinear(OUT, IN, group=group, products=products, **OVERLAP)
    row(column(torch.randn(BATCH, SEQ // 2, IN))).sum().backward()
    # The row's output gradient and the column's input are those of the whole sequence.
    assert products.shapes == [
        ((BATCH, SEQ, IN), (BATCH, SEQ, OUT // 2)),
        ((BATCH, SEQ, OUT // 2), (BATCH, SEQ, IN)),
    ]


def test_what_cannot_overlap_is_refused() -> None:
    run_ranks(2, check_refusals)


def check_refusals() -> None:
    group = build_groups(ParallelDims(tensor=2)).tensor
    for layer in (ColumnParallelLinear, RowParallelLinear):
        with pytest.raises(ValueError, match="symmetric_memory needs sequence_parallel"):
            layer(IN, OUT, group=group, symmetric_memory=True)
    row = RowParallelLinear(IN, OUT, group=group, **OVERLAP)
    with pytest.raises(ValueError, match="cannot split dimension -2 of .* over 2 ranks"):
        row(torch.randn(BATCH, 3, IN // 2))
