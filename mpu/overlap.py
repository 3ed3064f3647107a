"""Linear layers that multiply while parts of a sequence are on their way between GPUs.

With sequence parallelism, a collective stands beside each product that is not a weight gradient's:

                     forward                        backward, gradient of the input
    column-parallel  all-gather, then product       product, then reduce-scatter
    row-parallel     product, then reduce-scatter   all-gather, then product

Each waits until the other is complete. Only the reduction of a column-parallel layer's gradient has
other work beside it, the weight gradient; that of a row-parallel layer needs the very gradient that
is being gathered. To hide the others, both halves are cut: while one rank's part is multiplied, the
next one is copied. Torch has operators for that, in which GPUs read each other's memory (symmetric
memory). They exist on GPUs only, and compute what the ordinary layers compute.

With several samples in a batch the operators put the sequence first in memory, whatever the shape.
"""

from typing import Any

import torch
import torch.distributed._symmetric_memory  # noqa: F401, it registers the operators
from torch import Tensor
from torch.distributed import ProcessGroup

from mpu.collectives import check_divides
from mpu.mappings import SEQUENCE_DIM
from mpu.products import Products, bias_gradient, main_grad


def gather_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup, products: Products
) -> Tensor:
    """Gather a sequence and multiply it: ``(*, seq / size, in)`` -> ``(*, seq, out / size)``.

    Args:
        weight: this rank's part, ``(out / size, in)``.
        bias: this rank's part, ``(out / size,)``.
        group: of more than one rank.
        products: of the weight's gradient.
    """
    return _GatherLinear.apply(x, weight, bias, group, products)


def linear_reduce_scatter(
    x: Tensor, weight: Tensor, group: ProcessGroup, products: Products
) -> Tensor:
    """Multiply and keep a part of the sum: ``(*, seq, in / size)`` -> ``(*, seq / size, out)``.

    Args:
        weight: this rank's part, ``(out, in / size)``.
        group: of more than one rank.
        products: of the weight's gradient.

    Raises:
        ValueError: if the sequence does not divide by the size of the group.
    """
    return _LinearReduceScatter.apply(x, weight, group, products)


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: ProcessGroup,
        products: Products,
    ) -> Tensor:
        gathered, y = _gather_product(x, weight.t(), group)
        ctx.save_for_backward(gathered, weight)
        ctx.group = group
        ctx.products, ctx.main_grad = products, main_grad(weight)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        gathered, weight = ctx.saved_tensors
        grad_x = _product_reduce_scatter(grad, weight, ctx.group)
        grad_weight = _weight_gradient(ctx, grad, gathered)
        grad_bias = bias_gradient(grad) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None


class _LinearReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, group: ProcessGroup, products: Products
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.products, ctx.main_grad = group, products, main_grad(weight)
        return _product_reduce_scatter(x, weight.t(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        # Gathered once, for both gradients.
        gathered, grad_x = _gather_product(grad, weight, ctx.group)
        return grad_x, _weight_gradient(ctx, gathered, x), None, None


def _weight_gradient(ctx: Any, grad: Tensor, x: Tensor) -> Tensor | None:
    """None where it is added in place, or the weight is frozen."""
    if not ctx.needs_input_grad[1]:
        return None
    gradient: Tensor | None = ctx.products.weight_gradient(
        ctx.products.prepare(grad), x, ctx.main_grad
    )
    return gradient


def _gather_product(x: Tensor, matrix: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The gathered sequence ``(*, seq, k)``, and its product with ``(k, n)``, ``(*, seq, n)``."""
    gathered, (y,) = torch.ops.symm_mem.fused_all_gather_matmul(
        x, [matrix], x.dim() + SEQUENCE_DIM, group.group_name
    )
    return gathered, y


def _product_reduce_scatter(x: Tensor, matrix: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's part of the sum of ``(*, seq, k)`` times ``(k, n)``, ``(*, seq / size, n)``."""
    check_divides(x, group, SEQUENCE_DIM)
    y: Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(
        x, matrix, "sum", x.dim() + SEQUENCE_DIM, group.group_name
    )
    return y
