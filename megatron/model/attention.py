"""The attention core: from queries, keys and values to each head's output.

    backend    how                                          for
    explicit   all scores, through FusedScaleMaskSoftmax    the definition
    blocked    block by block of queries                    CPU; dropout and bloom_bf16 anywhere
    sdpa       torch's scaled_dot_product_attention,        GPU
               ALiBi in widened queries and keys
    flex       torch's FlexAttention, compiled              GPU
    flash      the package flash-attn                       GPU, where it is installed

All compute the same. Only explicit and blocked have dropout of the probabilities, and round scores
as the published models did under ``bloom_bf16``; flash has no documents.

Shapes: (batch, heads, seq, head_size), with this rank's heads.
"""

import math

import torch
from torch import Tensor

from megatron.config import BACKENDS_WITH_DROPOUT, Backend, Config
from megatron.model.attention_backends.blocked import blocked_attention
from megatron.model.attention_backends.flash import flash_attention, flash_is_installed
from megatron.model.attention_backends.flex import flex_block_attention
from megatron.model.attention_backends.sdpa import sdpa_attention
from megatron.model.attention_bias import AttentionBias, AttentionDropout
from megatron.model.fused_softmax import FusedScaleMaskSoftmax
from mpu import dropout

__all__ = ["AttentionBias", "AttentionDropout", "Backend", "attention", "candidates", "runs_on"]


def runs_on(backend: Backend, device: torch.device) -> bool:
    """Whether ``backend`` can be used on ``device``, as far as what is installed goes."""
    if backend == "flash":
        return device.type == "cuda" and flash_is_installed()
    return backend != "flex" or device.type == "cuda"


def candidates(config: Config, device: torch.device) -> list[Backend]:
    """What ``auto`` may choose: what can do the work, without what is known to be slower.

    Dropout, and scores that are rounded as the published models' were, need backends that make the
    probabilities themselves.
    """
    if device.type == "cpu":
        return ["blocked"]
    if config.model.attention_dropout > 0 or config.model.rounds_scores:
        return ["explicit", "blocked"]
    able: list[Backend] = ["sdpa"]
    if config.train.dtype != "fp64":
        able.append("flex")
    if (
        runs_on("flash", device)
        and config.train.dtype == "bf16"
        and not config.data.reset_attention_mask
    ):
        able.append("flash")
    return able


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: AttentionBias,
    *,
    backend: Backend,
    attention_dropout: AttentionDropout | None = None,
) -> Tensor:
    """Attend: ``(batch, heads, queries, head_size)`` and keys and values of the same heads.

    Raises:
        ValueError: for what ``backend`` cannot do.
    """
    if backend == "explicit":
        return explicit_attention(query, key, value, bias, attention_dropout)
    if backend == "blocked":
        return blocked_attention(query, key, value, bias, attention_dropout)
    _check_can_do(backend, bias, attention_dropout)
    if backend == "sdpa":
        return sdpa_attention(query, key, value, bias)
    if backend == "flex":
        return _flex_attention(query, key, value, bias)
    return flash_attention(query, key, value, bias.slopes)


def _check_can_do(
    backend: Backend, bias: AttentionBias, attention_dropout: AttentionDropout | None
) -> None:
    """Refuse what would be computed wrong."""
    if attention_dropout is not None:
        able = " or ".join(BACKENDS_WITH_DROPOUT)
        raise ValueError(f"attention backend {backend} has no dropout; use {able}")
    if backend in ("flex", "flash") and bias.query_start > 0:
        raise ValueError(f"attention backend {backend} takes no cached keys; use blocked")
    if backend == "flash" and (bias.documents is not None or bias.exact_slopes is not bias.slopes):
        raise ValueError("attention backend flash has no documents and no bloom_bf16; use flex")


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, bias: AttentionBias) -> Tensor:
    return flex_block_attention(
        query,
        key,
        value,
        slopes=bias.exact_slopes,
        table=bias.rounded(key.size(-2)),
        blocks=bias.visible_blocks,
    )


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: AttentionBias,
    attention_dropout: AttentionDropout | None = None,
) -> Tensor:
    """Attention by its definition, with all scores in memory."""
    scale = 1 / math.sqrt(query.size(-1))
    rounded = bias.rounded(key.size(-2))
    if rounded is None:
        scores = query @ key.transpose(-1, -2)
    else:
        scores = _scores_with_bias(query, key, rounded, scale)
        scale = 1.0
    probabilities = FusedScaleMaskSoftmax(scale)(
        scores, visible=bias.visible, slopes=bias.exact_slopes, query_start=bias.query_start
    )
    if attention_dropout is not None:
        probabilities = dropout(
            probabilities, attention_dropout.probability, attention_dropout.keys
        )
    return probabilities @ value


def _scores_with_bias(query: Tensor, key: Tensor, rounded: Tensor, scale: float) -> Tensor:
    """Scaled scores plus the ALiBi bias, in one product that rounds once, like BLOOM's."""
    batch, heads, num_queries, _ = query.shape
    num_keys = key.size(-2)
    table = rounded.to(query.dtype).unsqueeze(1)  # (heads, 1, keys)
    scores = torch.baddbmm(
        table.repeat(batch, 1, 1),
        query.reshape(batch * heads, num_queries, -1),
        key.reshape(batch * heads, num_keys, -1).transpose(-1, -2),
        alpha=scale,
    )
    return scores.view(batch, heads, num_queries, num_keys)
