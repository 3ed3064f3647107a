"""Who attends to whom, and how much the distance counts: what all layers of a pass share."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megatron.config import AlibiPrecision
from megatron.model.alibi import bloom_bf16_bias
from megatron.model.attention_backends.flex import document_blocks
from megatron.model.fused_softmax import causal_mask


@dataclass(frozen=True)
class AttentionBias:
    """What all layers of one forward pass share: who sees whom, and ALiBi.

    A query sees its own key and those before it, in its document.

    Attributes:
        documents: number of each token's document, ``(batch, seq)``; None is one for all.
        slopes: ALiBi slopes of this rank's heads, float32 ``(heads,)``; None is no ALiBi.
        alibi_precision: see ``ModelConfig``.
        query_start: position of the first query, where the keys before it come from a cache; 0
            with ``documents``.
    """

    documents: Tensor | None = None
    slopes: Tensor | None = None
    alibi_precision: AlibiPrecision = "exact"
    query_start: int = 0

    @property
    def exact_slopes(self) -> Tensor | None:
        """The slopes, unless ``rounded`` has them."""
        return self.slopes if self.alibi_precision == "exact" else None

    def rounded(self, num_keys: int) -> Tensor | None:
        """BLOOM's rounded bias of each key, ``(heads, keys)``; None under ``exact``."""
        if self.slopes is None or self.alibi_precision == "exact":
            return None
        return bloom_bf16_bias(self.slopes, num_keys)

    @cached_property
    def visible(self) -> Tensor | None:
        """Which keys a query sees, boolean ``(batch, 1, queries, keys)``; None is causal."""
        if self.documents is None:
            return None
        assert self.query_start == 0, "documents together with cached keys"
        seq = self.documents.size(1)
        same = self.documents.unsqueeze(2) == self.documents.unsqueeze(1)
        return (same & causal_mask(seq, seq, 0, self.documents.device)).unsqueeze(1)

    @cached_property
    def visible_blocks(self) -> BlockMask | None:
        """``visible`` in the form that FlexAttention wants; None is causal."""
        return None if self.documents is None else document_blocks(self.documents)


@dataclass(frozen=True)
class AttentionDropout:
    """Dropout of the probabilities: how likely, and a key for each row, ``(batch, heads, seq)``."""

    probability: float
    keys: Tensor
