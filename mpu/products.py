"""Matrix products of the layers, and where their weight gradients go.

**Another number format.** A linear layer computes by an object of the class ``Products``. That of
this module, ``PLAIN``, multiplies numbers as they are; a model may hand its layers another one.

**Gradients in place.** A parameter may carry a buffer that its gradient is added to, possibly of a
higher precision (``set_main_grad``). The layers then add their product to it directly and give
autograd nothing, which saves a tensor of the size of the weight and two passes over it. Without a
buffer autograd gets the gradient as usual.

**Low precision on a CPU.** A product of bfloat16 matrices adds up in float32 whatever the hardware.
Some processors do that faster than a float32 product of converted matrices, and some slower, by a
factor of two and more either way.

**float32 on a CPU.** Torch multiplies by MKL, which on AMD's processors does not use all of their
instructions. There the products of a layer's output and of its input's gradient are oneDNN's.

What the processor is decides both, not a measurement, which could come out otherwise after a
resumption and change the last bits of the run.
"""

from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

_WEIGHT_ROWS = 2**14
"""Rows of a low-precision weight gradient that are computed at once before they are added up."""

_WEIGHT_BYTES = 2**23
"""Most memory of these rows in float32, which a CPU converts them to: from 32 MiB on, new pages."""

_ONEDNN_ROWS = 128
"""Fewest rows of a product by oneDNN, which rearranges the weight at every call."""


class Products(Protocol):
    """The three products of a linear layer with a weight of ``(out, in)``."""

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: ``(*, in)`` -> ``(*, out)``."""

    def prepare(self, grad: Tensor) -> Tensor:
        """The gradient of the output, ``(*, out)``, in the form that the next two take it in."""

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """``grad @ weight``: ``(*, out)`` -> ``(*, in)``."""

    def weight_gradient(self, grad: Tensor, x: Tensor, total: Tensor | None) -> Tensor | None:
        """``grad.T @ x`` over all leading dimensions; None if it was added to ``total``."""


class PlainProducts:
    """``Products`` of numbers as they are; see there."""

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias)

    def prepare(self, grad: Tensor) -> Tensor:
        return grad

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        return matmul(grad, weight)

    def weight_gradient(self, grad: Tensor, x: Tensor, total: Tensor | None) -> Tensor | None:
        return weight_gradient(grad, x, total)


PLAIN: Products = PlainProducts()


def set_main_grad(parameter: nn.Parameter, buffer: Tensor) -> None:
    """Let the layers add the gradient of ``parameter`` to ``buffer``, of its shape."""
    parameter.main_grad = buffer  # type: ignore[attr-defined]


def main_grad(weight: Tensor) -> Tensor | None:
    """The buffer that the gradient of ``weight`` is added to, if it has one.

    To be asked in the forward pass: recomputation gives a backward pass another object.
    """
    buffer: Tensor | None = getattr(weight, "main_grad", None)
    return buffer


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``(*, k)`` and ``(k, n)`` -> ``(*, n)``, of the dtype of ``a``; unknown to autograd."""
    return linear(a, b.t())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``(*, in)`` and ``(out, in)`` -> ``(*, out)``, of the dtype of ``x``; unknown to autograd."""
    if computes_in_float32(x):
        wide = None if bias is None else bias.float()
        return linear(x.float(), weight.float(), wide).to(x.dtype)
    if _is_for_onednn(x):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return nn.functional.linear(x, weight, bias)


def weight_gradient(grad: Tensor, x: Tensor, total: Tensor | None) -> Tensor | None:
    """``grad.T @ x``, ``(out, in)``, over all leading dimensions; None if added to ``total``.

    Args:
        grad: of the output, ``(*, out)``.
        x: input, ``(*, in)``.
        total: the weight's ``main_grad``.
    """
    rows, inputs = grad.reshape(-1, grad.size(-1)), x.reshape(-1, x.size(-1))
    if total is None:
        return matmul(rows.t(), inputs)
    add_product(total, rows, inputs)
    return None


def bias_gradient(grad: Tensor) -> Tensor:
    """The sum of ``(*, out)`` over all leading dimensions, ``(out,)``."""
    return grad.reshape(-1, grad.size(-1)).sum(dim=0)


def add_product(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add ``grad.T @ x`` to ``total``, which may be of a higher precision.

    ``(out, in)``, ``(rows, out)``, ``(rows, in)``.
    """
    if computes_in_float32(x):
        grad, x = grad.float(), x.float()
    if total.dtype == x.dtype:
        total.addmm_(grad.t(), x)
        return
    rows = _rows_at_once(total)
    for part, columns in zip(total.split(rows), grad.split(rows, dim=-1), strict=True):
        part += columns.t() @ x


def _rows_at_once(total: Tensor) -> int:
    """Rows of a low-precision product that are added to ``total``, ``(out, in)``, at once."""
    if total.device.type != "cpu":
        return _WEIGHT_ROWS
    row_bytes = total.element_size() * total.size(1)
    return min(_WEIGHT_ROWS, max(1, _WEIGHT_BYTES // row_bytes))


def computes_in_float32(x: Tensor) -> bool:
    """Whether products of ``x`` are computed from float32 copies."""
    low = x.dtype in (torch.bfloat16, torch.float16)
    return low and x.device.type == "cpu" and _multiplies_float32_faster()


def _is_for_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies ``x``, ``(*, in)``, faster than MKL."""
    # The compiler takes the operation only for weights that it rearranged itself.
    fits = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    return fits and x.shape[:-1].numel() >= _ONEDNN_ROWS and _has_faster_onednn()


@cache
def _multiplies_float32_faster() -> bool:
    """Whether this CPU multiplies float32 faster than bfloat16: x86 without fast instructions.

    Intel's are in AMX; its AVX512_BF16 was seen to be half as fast as float32, and that of AMD four
    times as fast. Releases of torch that cannot tell convert nothing.
    """
    capabilities = _capabilities()
    is_intel = str(capabilities.get("cpu_name")).startswith("Intel")
    is_fast = capabilities.get("amx_bf16") or (capabilities.get("avx512_bf16") and not is_intel)
    return capabilities.get("architecture") == "x86_64" and not is_fast


@cache
def _has_faster_onednn() -> bool:
    """Whether oneDNN multiplies float32 faster than MKL: on AMD's processors, by 5 to 15 %."""
    is_there = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )
    return is_there and str(_capabilities().get("cpu_name")).startswith("AMD")


def _capabilities() -> dict[str, object]:
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return found
