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
_BLOCK = 128
"""Positions of a block of queries, and of keys."""

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
    """As ``causal_blocks``, inside the document of the query.

    Documents change with every microbatch. As they follow one another, the first and the last
    number of each block tell what of it is seen, without a mask of all pairs of positions.

    Args:
        documents: numbers that do not fall along a sequence, ``(batch, seq)``.
    """
    _, seq = documents.shape
    last_of_block = torch.arange(_BLOCK - 1, seq + _BLOCK - 1, _BLOCK, device=documents.device)
    first, last = documents[:, ::_BLOCK], documents[:, last_of_block.clamp(max=seq - 1)]
    # (batch, blocks of queries, blocks of keys)
    seen = first.unsqueeze(2) == last.unsqueeze(1)
    whole = (last.unsqueeze(2) == first.unsqueeze(1)).tril(-1)
    if seq % _BLOCK != 0:
        # Some of its queries are not there.
        whole[:, -1] = False
    diagonal = torch.eye(first.size(1), dtype=torch.bool, device=documents.device)
    partly = (seen.tril(-1) | diagonal) & ~whole
    return BlockMask.from_kv_blocks(
        *_ordered(partly),
        *_ordered(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=document_mask(documents),
        seq_lengths=(seq, seq),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of queries the number of its blocks of keys, and which, before the others."""
    blocks = blocks.unsqueeze(1).int()
    return blocks.sum(-1, dtype=torch.int32), blocks.argsort(
        dim=-1, descending=True, stable=True
    ).int()


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
