"""FusedScaleMaskSoftmax in Triton: one program computes one row, in float32.

    probabilities = softmax(scale scores - slope (i - j))     over the visible keys j of query i
    dscores       = scale p (dp - sum(p dp))                  0 where a key is not visible

A row of up to _MAX_BLOCK keys is one block, read once and written once. A longer row goes block by
block, twice: for its sums, which the forward pass rescales whenever a larger logit turns up, and
for its results. A causal row is zero beyond its query i, where next to nothing is read:

    | block             | block             | block             |
    | read              | read      i 0 0 0 | 0 0 0 0 0 0 0 0 0 |

Shapes: (batch, heads, queries, keys). The grid of programs is (queries, heads, batch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels read and write."""

_MAX_BLOCK = 8192
_KEYS_PER_WARP = 512
"""16 for each thread, which leaves room in its registers."""


def is_available(device: torch.device) -> bool:
    """Whether the kernels run on ``device``: a GPU, or, where Triton interprets, any."""
    return triton is not None and (device.type == "cuda" or triton.knobs.runtime.interpret)


def fused_scale_mask_softmax(
    scores: Tensor,
    scale: float,
    visible: Tensor | None,
    slopes: Tensor | None,
    query_start: int,
) -> Tensor:
    """Probabilities; the arguments are those of ``FusedScaleMaskSoftmax``.

    ``scores`` have one of ``DTYPES``; the gradient goes to them alone. The mask is read through its
    strides, never expanded in memory.
    """
    probabilities: Tensor = _FusedScaleMaskSoftmax.apply(
        scores, scale, visible, slopes, query_start
    )
    return probabilities


class _FusedScaleMaskSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        scale: float,
        visible: Tensor | None,
        slopes: Tensor | None,
        query_start: int,
    ) -> Tensor:
        probabilities = torch.empty_like(scores, memory_format=torch.contiguous_format)
        inputs = (scores.contiguous(), None if slopes is None else slopes.contiguous())
        _launch(_forward, probabilities, inputs, visible, scale, query_start)
        ctx.save_for_backward(probabilities, visible)
        ctx.scale, ctx.query_start = scale, query_start
        return probabilities

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        probabilities, visible = ctx.saved_tensors
        dscores = torch.empty_like(probabilities)
        inputs = (probabilities, grad.contiguous())
        _launch(_backward, dscores, inputs, visible, ctx.scale, ctx.query_start)
        return dscores, None, None, None, None


def _launch(
    kernel: Any,
    out: Tensor,
    inputs: tuple[Tensor, Tensor | None],
    visible: Tensor | None,
    scale: float,
    query_start: int,
) -> None:
    """Run ``kernel`` for every row of the contiguous ``out``."""
    batch, heads, queries, keys = out.shape
    strides = (0, 0, 0)
    if visible is not None:
        batch_stride, _, query_stride, key_stride = visible.expand(batch, 1, queries, keys).stride()
        strides = (batch_stride, query_stride, key_stride)
    block = min(triton.next_power_of_2(keys), _MAX_BLOCK)
    # Triton launches on the current GPU, which need not be that of the tensors.
    with torch.cuda.device_of(out):
        kernel[(queries, heads, batch)](
            out,
            *inputs,
            visible,
            *strides,
            scale,
            query_start,
            keys,
            block=block,
            one_block=keys <= block,
            num_warps=max(1, block // _KEYS_PER_WARP),
            # One rounding for scale * score - bias; Triton's default is about to change.
            enable_fp_fusion=True,
        )


def _kernel(function: Callable[..., Any]) -> Any:
    """What Triton makes of ``function``; without Triton, nobody calls it."""
    return function if triton is None else triton.jit(function)


@_kernel
def _forward(
    out: tl.tensor,
    scores: tl.tensor,
    slopes: tl.tensor,
    visible: tl.tensor,
    batch_stride: tl.tensor,
    query_stride: tl.tensor,
    key_stride: tl.tensor,
    scale: tl.tensor,
    query_start: tl.tensor,
    num_keys: tl.tensor,
    block: tl.constexpr,
    one_block: tl.constexpr,
) -> None:
    """``out`` gets the probabilities of a row; ``slopes`` and ``visible`` may be None."""
    row = _row_offset(num_keys)
    out += row
    scores += row
    seen = _mask_row(visible, batch_stride, query_stride)
    query = query_start + tl.program_id(0)
    end = _end_of_reading(visible, query, num_keys)
    slope = 0.0
    if slopes is not None:
        slope = tl.load(slopes + tl.program_id(1))
    keys = tl.arange(0, block)
    if one_block:
        logits = _logits(scores, seen, key_stride, keys, end, scale, slope, query)
        weights = tl.exp(logits - tl.max(logits))
        tl.store(out + keys, weights / tl.sum(weights), mask=keys < num_keys)
    else:
        largest = -float("inf")
        total = 0.0
        for start in range(0, end, block):
            logits = _logits(scores, seen, key_stride, start + keys, end, scale, slope, query)
            larger = tl.maximum(largest, tl.max(logits))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger))
            largest = larger
        for start in range(0, num_keys, block):
            logits = _logits(scores, seen, key_stride, start + keys, end, scale, slope, query)
            weights = tl.exp(logits - largest)
            tl.store(out + start + keys, weights / total, mask=start + keys < num_keys)


@_kernel
def _backward(
    out: tl.tensor,
    probabilities: tl.tensor,
    grad: tl.tensor,
    visible: tl.tensor,
    batch_stride: tl.tensor,
    query_stride: tl.tensor,
    key_stride: tl.tensor,
    scale: tl.tensor,
    query_start: tl.tensor,
    num_keys: tl.tensor,
    block: tl.constexpr,
    one_block: tl.constexpr,
) -> None:
    """``out`` gets the gradient of a row of scores; ``visible`` may be None."""
    row = _row_offset(num_keys)
    out += row
    probabilities += row
    grad += row
    seen = _mask_row(visible, batch_stride, query_stride)
    end = _end_of_reading(visible, query_start + tl.program_id(0), num_keys)
    keys = tl.arange(0, block)
    if one_block:
        p, dp = _visible_pair(probabilities, grad, seen, key_stride, keys, end)
        tl.store(out + keys, scale * p * (dp - tl.sum(p * dp)), mask=keys < num_keys)
    else:
        inner = 0.0
        for start in range(0, end, block):
            p, dp = _visible_pair(probabilities, grad, seen, key_stride, start + keys, end)
            inner += tl.sum(p * dp)
        for start in range(0, num_keys, block):
            p, dp = _visible_pair(probabilities, grad, seen, key_stride, start + keys, end)
            mask = start + keys < num_keys
            tl.store(out + start + keys, scale * p * (dp - inner), mask=mask)


@_kernel
def _row_offset(num_keys: tl.tensor) -> tl.tensor:
    """Elements before this program's row, which may be more than int32 counts."""
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    return (head * tl.num_programs(0) + tl.program_id(0)) * num_keys


@_kernel
def _mask_row(visible: tl.tensor, batch_stride: tl.tensor, query_stride: tl.tensor) -> tl.tensor:
    """This program's row of the mask, or None."""
    if visible is not None:
        visible += tl.program_id(2).to(tl.int64) * batch_stride
        visible += tl.program_id(0).to(tl.int64) * query_stride
    return visible


@_kernel
def _end_of_reading(visible: tl.tensor, query: tl.tensor, num_keys: tl.tensor) -> tl.tensor:
    """The key from which on nothing of the row is read.

    It is a multiple of 16, so that reading up to it takes wide loads.
    """
    end = num_keys
    if visible is None:
        end = tl.minimum(num_keys, (query // 16 + 1) * 16)
    return end


@_kernel
def _logits(
    scores: tl.tensor,
    seen: tl.tensor,
    key_stride: tl.tensor,
    keys: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    slope: tl.tensor,
    query: tl.tensor,
) -> tl.tensor:
    """Scaled scores and bias of ``keys``: the lowest number where not visible, -inf past ``end``.

    A row that sees nothing so has equal logits, and attends to all keys alike.
    """
    inside = keys < end
    logits = scale * tl.load(scores + keys, mask=inside, other=0.0).to(tl.float32)
    logits -= slope * (query - keys)
    if seen is None:
        shown = keys <= query
    else:
        shown = tl.load(seen + keys * key_stride, mask=inside, other=0)
    return tl.where(inside, tl.where(shown, logits, -3.4e38), -float("inf"))


@_kernel
def _visible_pair(
    probabilities: tl.tensor,
    grad: tl.tensor,
    seen: tl.tensor,
    key_stride: tl.tensor,
    keys: tl.tensor,
    end: tl.tensor,
) -> tl.tensor:
    """Probabilities of ``keys``, 0 where not visible, and their gradients."""
    inside = keys < end
    p = tl.load(probabilities + keys, mask=inside, other=0.0).to(tl.float32)
    dp = tl.load(grad + keys, mask=inside, other=0.0).to(tl.float32)
    if seen is not None:
        p = tl.where(tl.load(seen + keys * key_stride, mask=inside, other=0), p, 0.0)
    return p, dp
