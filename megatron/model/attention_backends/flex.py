"""Attention by torch's FlexAttention, which compiles the bias into a kernel. GPU only.

The bias reaches the kernel as a change of each score, which it looks up or computes:

    exact        score + slope (j - i), from the float32 slopes of this rank's heads
    bloom_bf16   score + table[head, j], from BLOOM's bias rounded to bfloat16

What is compiled is one function with the slopes and the table as inputs, so that it is compiled
once for the shapes of a run. The shapes are static: with dynamic ones, torch has had wrong
gradients of keys that are slices. Masks are made of blocks of 128 x 128 scores, which the kernel
skips, computes, or computes and masks.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def flex_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    slopes: Tensor | None,
    table: Tensor | None,
    blocks: BlockMask | None,
) -> Tensor:
    """Attend, ``(batch, heads, seq, head_size)``, queries and keys of the same positions.

    Args:
        slopes: ALiBi slopes, float32 ``(heads,)``; None is no ALiBi, or that of ``table``.
        table: bias of each key, ``(heads, seq)``; None is that of ``slopes``.
        blocks: who sees whom; None is causal.
    """
    if blocks is None:
        blocks = causal_blocks(query.size(-2), query.device)
    return _compiled()(query, key, value, slopes, table, blocks)


@cache
def causal_blocks(seq: int, device: torch.device) -> BlockMask:
    """Blocks in which a query sees its own key and those before it."""
    return create_block_mask(_is_before, None, None, seq, seq, device=device)


def document_blocks(documents: Tensor) -> BlockMask:
    """As ``causal_blocks``, inside the document of the query, with numbers ``(batch, seq)``."""
    batch, seq = documents.shape
    mask = document_mask(documents)
    return create_block_mask(mask, batch, None, seq, seq, device=documents.device)


def document_mask(documents: Tensor) -> MaskMod:
    """Whether a query sees a key, by the numbers of their documents."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = documents[batch, query] == documents[batch, key]
        return same & _is_before(batch, head, query, key)

    return sees


def alibi_score(slopes: Tensor | None, table: Tensor | None) -> ScoreMod | None:
    """How ALiBi changes a score; None if it does not."""

    def add_slope(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert slopes is not None
        return score + slopes[head] * (key - query)

    def add_table(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert table is not None
        return score + table[head, key]

    if table is not None:
        return add_table
    return None if slopes is None else add_slope


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor | None,
    table: Tensor | None,
    blocks: BlockMask,
) -> Tensor:
    """What is compiled."""
    scale = 1 / math.sqrt(query.size(-1))
    score_mod = alibi_score(slopes, table)
    out = flex_attention(query, key, value, score_mod=score_mod, block_mask=blocks, scale=scale)
    assert isinstance(out, Tensor)
    return out


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(attend, dynamic=False)


def _is_before(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query
