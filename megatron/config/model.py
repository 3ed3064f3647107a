"""The shape of the model."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from megatron.config.rules import (
    require,
    require_below_one,
    require_multiple,
    require_not_negative,
    require_positive,
)

Activation: TypeAlias = Literal["gelu", "liglu", "geglu", "reglu", "swiglu"]
PositionEmbedding: TypeAlias = Literal["alibi", "rotary", "learned", "none"]
AlibiPrecision: TypeAlias = Literal["exact", "bloom_bf16"]
Backend: TypeAlias = Literal["explicit", "blocked", "sdpa", "flex", "flash"]
AttentionBackend: TypeAlias = Literal["auto", Backend]

BACKENDS_WITH_DROPOUT: tuple[Backend, ...] = ("explicit", "blocked")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the model."""

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the hidden states; a multiple of num_heads."""
    num_heads: int
    """Attention heads in each layer."""
    vocab_size: int
    """Number of tokens that the tokenizer knows."""
    seq_length: int
    """Tokens in one training sample."""

    ffn_hidden_size: int | None = None
    """Width of the MLP; null is 4 * hidden_size."""
    vocab_padding_multiple: int = 128
    """Rows of the vocabulary on each tensor rank are padded to a multiple of this."""
    tie_embeddings: bool = True
    """Use the word embedding as output layer too."""
    embedding_layernorm: bool = True
    """Normalise the word embedding, as BLOOM does."""
    position_embedding: PositionEmbedding = "alibi"
    """How attention learns of positions; BLOOM has alibi."""
    alibi_precision: AlibiPrecision = "exact"
    """bloom_bf16 rounds the bias as the published BLOOM models were trained."""
    num_token_types: int = 0
    """Size of the token-type embedding; 0 leaves it out."""
    pooler: bool = False
    """Add a pooled representation of the first token."""
    activation: Activation = "gelu"
    """Of the MLP; all but gelu are gated, with a third matrix. BLOOM has gelu."""
    layernorm: Literal["torch", "apex"] = "torch"
    """Whose layer norm computes; apex is a package to install."""
    layernorm_epsilon: float = 1e-5
    """Added to the variance that a layer norm divides by the root of."""
    hidden_dropout: float = 0.0
    """Probability with which an element of a layer's output is dropped."""
    attention_dropout: float = 0.0
    """Probability with which an attention weight is dropped."""
    init_std: float | None = None
    """Standard deviation of the initial weights; null is BLOOM's sqrt(1 / (3 hidden_size))."""
    attention_backend: AttentionBackend = "auto"
    """How attention is computed; auto takes blocked on CPUs, and on GPUs what is the fastest."""

    def __post_init__(self) -> None:
        require_positive(
            "model",
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            vocab_size=self.vocab_size,
            seq_length=self.seq_length,
            ffn_hidden_size=self.ffn_size,
            vocab_padding_multiple=self.vocab_padding_multiple,
            layernorm_epsilon=self.layernorm_epsilon,
            init_std=self.initial_std,
        )
        require_not_negative("model", num_token_types=self.num_token_types)
        require_below_one(
            "model",
            hidden_dropout=self.hidden_dropout,
            attention_dropout=self.attention_dropout,
        )
        require_multiple("model.hidden_size", self.hidden_size, "model.num_heads", self.num_heads)
        require(
            self.position_embedding != "rotary" or self.head_size % 2 == 0,
            f"model.position_embedding rotary needs an even head size, got {self.head_size} "
            "(model.hidden_size / model.num_heads)",
        )
        self._check_backend()

    def _check_backend(self) -> None:
        backend = self.attention_backend
        require(
            self.attention_dropout == 0 or backend in ("auto", *BACKENDS_WITH_DROPOUT),
            f"model.attention_backend {backend} needs model.attention_dropout 0, "
            f"got {self.attention_dropout}",
        )
        require(
            backend != "flash" or not self.rounds_scores,
            "model.attention_backend flash needs model.alibi_precision exact, "
            f"got {self.alibi_precision}",
        )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def ffn_size(self) -> int:
        return 4 * self.hidden_size if self.ffn_hidden_size is None else self.ffn_hidden_size

    @property
    def rounds_scores(self) -> bool:
        """Attention scores are rounded with BLOOM's bias in them."""
        return self.position_embedding == "alibi" and self.alibi_precision == "bloom_bf16"

    @property
    def is_gated(self) -> bool:
        return self.activation != "gelu"

    @property
    def initial_std(self) -> float:
        return math.sqrt(1 / (3 * self.hidden_size)) if self.init_std is None else self.init_std
