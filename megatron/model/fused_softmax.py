"""FusedScaleMaskSoftmax: from attention scores to probabilities.

    probabilities = softmax(scale * scores - slope (i - j), over the visible keys j)

with query positions i, computed in float32 whatever the dtype of the scores (float64 in float64).

    path               where                                       memory traffic
    softmax_kernels    GPUs with Triton, up to float32             scores once in, probabilities out
    torch operations   everywhere; the definition of the result    a float32 copy for each operation
"""

import logging
from functools import cache

import torch
from torch import Tensor, nn

from megatron.model import softmax_kernels

logger = logging.getLogger(__name__)


class FusedScaleMaskSoftmax(nn.Module):
    """Scale, ALiBi bias, mask and softmax of attention scores.

    Args:
        scale: factor of the scores.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self,
        scores: Tensor,
        *,
        visible: Tensor | None = None,
        slopes: Tensor | None = None,
        query_start: int = 0,
    ) -> Tensor:
        """Probabilities, ``(batch, heads, queries, keys)`` like ``scores`` and of their dtype.

        Args:
            visible: which keys a query sees, boolean, ``(batch or 1, 1, queries, keys)``; None is
                causal. A query that sees nothing attends to all keys alike.
            slopes: ALiBi slope of each head, float32 ``(heads,)``.
            query_start: position of the first query; the first key has position 0.
        """
        fused = scores.dtype in softmax_kernels.DTYPES and _has_kernels(scores.device)
        softmax = softmax_kernels.fused_scale_mask_softmax if fused else scale_mask_softmax
        return softmax(scores, self.scale, visible, slopes, query_start)


@cache
def _has_kernels(device: torch.device) -> bool:
    """Whether the kernels run on ``device``; the log says so once."""
    available = softmax_kernels.is_available(device)
    logger.info("attention softmax on %s: %s", device, "Triton" if available else "torch")
    return available


def scale_mask_softmax(
    scores: Tensor,
    scale: float,
    visible: Tensor | None,
    slopes: Tensor | None,
    query_start: int,
) -> Tensor:
    """What ``FusedScaleMaskSoftmax`` computes, by torch operations."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    logits = scores.to(dtype) * scale
    num_queries, num_keys = scores.shape[-2:]
    if slopes is not None:
        distance = _distance(num_queries, num_keys, query_start, scores.device)
        logits = logits - slopes.to(dtype)[:, None, None] * distance
    if visible is None:
        visible = causal_mask(num_queries, num_keys, query_start, scores.device)
    logits = logits.masked_fill(~visible, torch.finfo(dtype).min)
    return torch.softmax(logits, dim=-1).to(scores.dtype)


def causal_mask(num_queries: int, num_keys: int, query_start: int, device: torch.device) -> Tensor:
    """Which keys a query sees, boolean ``(queries, keys)``: itself and those before it."""
    return _distance(num_queries, num_keys, query_start, device) >= 0


def _distance(num_queries: int, num_keys: int, query_start: int, device: torch.device) -> Tensor:
    """Query position minus key position, ``(queries, keys)``."""
    queries = torch.arange(query_start, query_start + num_queries, device=device)
    return queries.unsqueeze(-1) - torch.arange(num_keys, device=device)
