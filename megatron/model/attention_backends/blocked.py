r"""Exact attention over blocks of queries, each with the keys that it can see.

    keys      0 ......................... n
    block 0   [####\ ]                         the triangle at the end of a block is masked,
    block 1   [########\ ]                     what lies right of it is not computed
    block 2   [############\ ]

Half of the scores are never computed, and those of a block stay in the cache of a CPU between the
product, the softmax and the next product. The backward pass is written by hand: the probabilities
are kept, half as many as by the definition, and all else is computed in place. To compute them
again instead costs a quarter more time; ``train.recompute`` does that for whoever needs the memory.

**Rounding.** The ALiBi bias is relative to the middle of the block, so that the bias of near keys
is small and its sum with the score precise. In 16-bit numbers it is added after the product, in
float32; probabilities are kept, and gradients of keys and values summed, in float32 too. Under
``bloom_bf16`` it is BLOOM's rounded bias of absolute positions, added inside the product, as by the
definition.

Letters: m batch x heads, r queries of a block, k keys that a block sees, d head size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.model.attention_bias import AttentionBias, AttentionDropout
from mpu import dropout

_ROWS = 128
"""Queries of a block. On a CPU, 64 to 128 are the fastest up to 1024 keys, and 128 beyond."""


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: AttentionBias,
    attention_dropout: AttentionDropout | None = None,
) -> Tensor:
    """Attend: ``(batch, heads, queries, head_size)`` and keys and values of the same heads."""
    batch, heads, _, head_size = query.shape
    flat = (x.reshape(batch * heads, -1, head_size) for x in (query, key, value))
    rule = _Rule(bias, attention_dropout, batch, heads, 1 / math.sqrt(head_size))
    out: Tensor = _BlockedAttention.apply(*flat, rule)
    return out.view(query.shape)


@dataclass(frozen=True)
class _Rule:
    """How scores become what the values are weighted with, for all blocks."""

    bias: AttentionBias
    dropout: AttentionDropout | None
    batch: int
    heads: int
    scale: float

    def blocks(self, num_queries: int) -> Iterator[tuple[slice, slice]]:
        """The queries of each block, and the keys that its last query sees."""
        for start in range(0, num_queries, _ROWS):
            stop = min(start + _ROWS, num_queries)
            yield slice(start, stop), slice(self.bias.query_start + stop)

    def probabilities(self, query: Tensor, key: Tensor, rows: slice) -> Tensor:
        """Of ``rows`` of the queries, ``(m, r, d)``, to the keys ``(m, k, d)`` -> ``(m, r, k)``."""
        offset = self._offset(query, key.size(1))
        if offset.dtype == query.dtype:
            scores = torch.baddbmm(offset, query, key.mT, alpha=self.scale)
        else:
            scores = torch.add(offset, torch.bmm(query, key.mT), alpha=self.scale)
        self._hide(scores, rows)
        return torch.softmax(scores, dim=-1, dtype=_wide(query.dtype))

    def drop(self, x: Tensor, rows: slice) -> Tensor:
        """Dropout of probabilities or of their gradient, ``(m, r, k)``: linear, and the same."""
        if self.dropout is None:
            return x
        keys = self.dropout.keys.reshape(x.size(0), -1)
        return dropout(x, self.dropout.probability, keys[:, rows])

    def _offset(self, query: Tensor, num_keys: int) -> Tensor:
        """What is added to the scores, ``(m, 1, k)``; in ``query``'s dtype, before they round."""
        dtype = _wide(query.dtype)
        slopes, rounded = self.bias.exact_slopes, self.bias.rounded(num_keys)
        if rounded is not None:
            table = rounded.to(query.dtype)
        elif slopes is not None:
            middle = num_keys - query.size(1) // 2
            distances = torch.arange(-middle, num_keys - middle, device=slopes.device)
            table = slopes.to(dtype).unsqueeze(1) * distances
        else:
            return query.new_zeros(1, 1, 1, dtype=dtype)
        return table.repeat(self.batch, 1).unsqueeze(1)

    def _hide(self, scores: Tensor, rows: slice) -> None:
        """Mask, in place, the keys that a query does not see."""
        num_rows, num_keys = scores.shape[1:]
        visible = self.bias.visible
        if visible is not None:
            by_head = scores.view(self.batch, self.heads, num_rows, num_keys)
            by_head.masked_fill_(~visible[:, :, rows, :num_keys], -math.inf)
            return
        corner = scores[:, :, num_keys - num_rows :]
        corner += torch.full_like(corner[0], -math.inf).triu(1)


class _BlockedAttention(torch.autograd.Function):
    """``(m, queries, d)`` and keys and values ``(m, keys, d)`` -> ``(m, queries, d)``."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rule: _Rule) -> Tensor:
        out = torch.empty_like(query)
        kept = []
        for rows, seen in rule.blocks(query.size(1)):
            probabilities = rule.probabilities(query[:, rows], key[:, seen], rows)
            weights = rule.drop(probabilities.to(value.dtype), rows)
            out[:, rows].baddbmm_(weights, value[:, seen], beta=0)
            if any(ctx.needs_input_grad):
                kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.rule = rule
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *kept = ctx.saved_tensors
        rule: _Rule = ctx.rule
        wide = _wide(query.dtype)
        wide_query, wide_grad = query.to(wide), grad.to(wide)
        grad_query = torch.empty_like(query)
        # Sums over the blocks, which would round with each block.
        grad_key, grad_value = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        blocks = rule.blocks(query.size(1))
        for probabilities, (rows, seen) in zip(kept, blocks, strict=True):
            weights = rule.drop(probabilities, rows)
            grad_value[:, seen].baddbmm_(weights.mT, wide_grad[:, rows])
            grad_weights = rule.drop(torch.bmm(grad[:, rows], value[:, seen].mT), rows)
            grad_scores = torch._softmax_backward_data(
                grad_weights.to(wide), probabilities, -1, wide
            )
            grad_key[:, seen].baddbmm_(grad_scores.mT, wide_query[:, rows], alpha=rule.scale)
            narrow = grad_scores.to(query.dtype)
            grad_query[:, rows].baddbmm_(narrow, key[:, seen], beta=0, alpha=rule.scale)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What a softmax of scores of ``dtype`` is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
