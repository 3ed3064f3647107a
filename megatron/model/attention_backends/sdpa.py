"""Attention by torch's scaled_dot_product_attention, which never holds all scores.

**ALiBi by widening.** A softmax does not change when a row is shifted, so the bias of query i and
key j may be m j instead of -m (i - j). That is a product of something of the head and something of
the key: appended to query and key as further columns, it comes out of the product of the two, and
any attention kernel computes it without knowing of it. In bfloat16, m is written as a sum of three
bfloat16 numbers and j as 256 a + b, which are exact, so that the bias is as precise as in float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.config import AlibiPrecision
from megatron.model.alibi import bloom_bf16_bias
from megatron.model.attention_bias import AttentionBias
from megatron.model.fused_softmax import causal_mask

_EXTRA_COLUMNS = 8
"""Columns that widening adds: six are used, and kernels want multiples of eight."""


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, bias: AttentionBias) -> Tensor:
    """Attention by torch's kernels, which never hold all scores."""
    head_size = query.size(-1)
    scale = 1 / math.sqrt(head_size)
    if bias.slopes is not None:
        query, key, value = _widen(query, key, value, bias.slopes, bias.alibi_precision, scale)
    visible = bias.visible
    if visible is None and bias.query_start > 0:
        visible = causal_mask(query.size(-2), key.size(-2), bias.query_start, query.device)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, is_causal=visible is None, scale=scale
    )
    return out[..., :head_size]


def _widen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    precision: AlibiPrecision,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Append the columns whose product is the ALiBi bias divided by ``scale``."""
    num_keys = key.size(-2)
    if precision == "exact":
        query_columns, key_columns = _exact_columns(slopes, num_keys, query.dtype, scale)
    else:
        query_columns, key_columns = _rounded_columns(slopes, num_keys, query.dtype, scale)
    return (
        _append(query, query_columns),
        _append(key, key_columns),
        F.pad(value, (0, _EXTRA_COLUMNS)),
    )


def _exact_columns(
    slopes: Tensor, num_keys: int, dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor]:
    """``(heads, 1, 6)`` of the slopes and ``(1, keys, 6)`` of the positions."""
    pieces = _split(slopes.double() / scale, dtype)  # (heads, 3)
    positions = torch.arange(num_keys, device=slopes.device)
    low = positions % 256
    high = positions - low
    key_columns = torch.stack([high] * 3 + [low] * 3, dim=-1).to(dtype)
    return torch.cat([pieces, pieces], dim=-1).unsqueeze(1), key_columns.unsqueeze(0)


def _rounded_columns(
    slopes: Tensor, num_keys: int, dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor]:
    """``(1, 1, 3)`` of the scale and ``(heads, keys, 3)`` of BLOOM's rounded bias."""
    # Filled on the device: a copy of the number would make the CPU wait for it.
    factor = torch.full((1,), 1 / scale, dtype=torch.float64, device=slopes.device)
    pieces = _split(factor, dtype)
    key_columns = bloom_bf16_bias(slopes, num_keys).to(dtype).unsqueeze(-1)
    return pieces.unsqueeze(1), key_columns.expand(-1, -1, 3)


def _split(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Write float64 ``(n,)`` as a sum of three numbers of ``dtype``, ``(n, 3)``."""
    pieces = []
    for _ in range(3):
        piece = x.to(dtype)
        pieces.append(piece)
        x = x - piece.double()
    return torch.stack(pieces, dim=-1)


def _append(x: Tensor, columns: Tensor) -> Tensor:
    """``(batch, heads, seq, n)`` and ``(heads, seq, used)`` -> ``(batch, heads, seq, n + 8)``."""
    columns = F.pad(columns, (0, _EXTRA_COLUMNS - columns.size(-1)))
    return torch.cat([x, columns.expand(*x.shape[:-1], -1)], dim=-1)
