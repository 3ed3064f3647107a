"""The language model: embedding, transformer, pooler, and BLOOM's head with its loss.

A model may be one stage of a pipeline, which holds some of the layers. The first has the embedding,
and takes tokens where others take hidden states; the last has the head, and gives the loss where
others give hidden states. With tied embeddings both hold the word embedding, under the same name;
that of the last stage is marked as a copy.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.config import Backend, ModelConfig, Recompute
from megatron.model.alibi import alibi_slopes
from megatron.model.attention import AttentionBias
from megatron.model.inputs import ModelInputs
from megatron.model.placement import Placement, build_layer_norm
from megatron.model.rotary import RotaryTable
from megatron.model.stages import Stage, whole_model
from megatron.model.transformer import (
    DropoutSite,
    KeyValueCache,
    LayerContext,
    ParallelTransformer,
)
from mpu import (
    RngStreams,
    VocabParallelEmbedding,
    copy_to_device,
    copy_to_region,
    dropout,
    gather_from_sequence,
    mark_whole,
    set_shard_spec,
    shard_spec,
    vocab_parallel_linear_cross_entropy,
)

_EMBEDDING_LAYER = -1
"""Stands for the embedding where a random number is named by its layer."""


class Embedding(nn.Module):
    """Word, position and token-type embeddings: ``(b, s)`` -> ``(b, s or s/t, h)``.

    The sum of the last two, where there are any, comes after the layer norm of the first.
    """

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.word_embeddings = _build_word_table(config, placement)
        self.word_embeddings_layernorm: nn.Module | None = None
        if config.embedding_layernorm:
            self.word_embeddings_layernorm = build_layer_norm(config, placement)
        self.position_embeddings: nn.Embedding | None = None
        if config.position_embedding == "learned":
            self.position_embeddings = _replicated_table(config.seq_length, config, placement)
        self.token_type_embeddings: nn.Embedding | None = None
        if config.num_token_types > 0:
            self.token_type_embeddings = _replicated_table(
                config.num_token_types, config, placement
            )

    def forward(
        self, tokens: Tensor, positions: Tensor, token_types: Tensor | None, context: LayerContext
    ) -> Tensor:
        x: Tensor = self.word_embeddings(tokens)
        if self.word_embeddings_layernorm is not None:
            x = self.word_embeddings_layernorm(x)
        here = slice(context.positions.start, context.positions.stop)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(positions[:, here])
        if self.token_type_embeddings is not None and token_types is not None:
            x = x + self.token_type_embeddings(token_types[:, here])
        keys = context.dropout_keys(self.dropout, _EMBEDDING_LAYER, DropoutSite.EMBEDDING)
        return x if keys is None else dropout(x, self.dropout, keys)


class TiedEmbedding(nn.Module):
    """The copy of the word embedding that the head of the last stage uses."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        super().__init__()
        self.word_embeddings = _build_word_table(config, placement)
        _mark_tied(self.word_embeddings.weight, is_copy=True)


def _mark_tied(weight: nn.Parameter, *, is_copy: bool) -> None:
    set_shard_spec(weight, replace(shard_spec(weight), tied=True, tied_copy=is_copy))


def _build_word_table(config: ModelConfig, placement: Placement) -> VocabParallelEmbedding:
    return VocabParallelEmbedding(
        config.vocab_size,
        config.hidden_size,
        padding_multiple=config.vocab_padding_multiple,
        **placement.layer_options,
    )


def _replicated_table(rows: int, config: ModelConfig, placement: Placement) -> nn.Embedding:
    shape = (rows, config.hidden_size)
    # Given its weight, the table does not draw one.
    table = nn.Embedding.from_pretrained(torch.empty(shape, dtype=placement.dtype), freeze=False)
    mark_whole(table, sum_gradient=placement.sequence_parallel)
    return table


class Pooler(nn.Module):
    """A representation of the whole from its first token: ``(b, s, h)`` -> ``(b, h)``."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        super().__init__()
        size = config.hidden_size
        self.dense = nn.Linear(size, size, dtype=placement.dtype)
        mark_whole(self.dense)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden[:, 0]))


class TransformerLanguageModel(nn.Module):
    """From tokens to the hidden states after the final layer norm, or a stage of that way."""

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement,
        *,
        stage: Stage,
        backend: Backend,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.config = config
        self.placement = placement
        self.embedding: Embedding | TiedEmbedding | None = None
        if stage.first:
            self.embedding = Embedding(config, placement)
            if config.tie_embeddings and not stage.last:
                _mark_tied(self.embedding.word_embeddings.weight, is_copy=False)
        elif stage.last and config.tie_embeddings:
            self.embedding = TiedEmbedding(config, placement)
        self.transformer = ParallelTransformer(
            config, placement, stage=stage, backend=backend, recompute=recompute
        )
        self.pooler = Pooler(config, placement) if config.pooler and stage.last else None
        # On each device that tokens were on. Not a buffer, which casts of the model would round.
        self._slopes: dict[torch.device, Tensor] = {}

    def forward(
        self,
        tokens: Tensor,
        *,
        hidden: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
        streams: RngStreams | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """Hidden states, ``(b, s or s/t, h)``.

        Args:
            tokens: ids, ``(b, s)``.
            hidden: what the stage before gave; None on the first stage.
            positions: of the tokens, ``(b, s)``; default: 0, 1, ... after what ``caches`` hold.
            documents: number of each token's document, ``(b, s)``; attention stays inside.
            token_types: type of each token, ``(b, s)``.
            streams: random numbers of dropout; None is no dropout.
            caches: one for each layer, which the keys and values of ``tokens`` are added to.
        """
        start = caches[0].length if caches else 0
        if positions is None:
            count = torch.arange(start, start + tokens.size(1), device=tokens.device)
            positions = count.unsqueeze(0)
        context = self._context(tokens, positions, documents, streams, start)
        if isinstance(self.embedding, Embedding):
            hidden = self.embedding(tokens, positions, token_types, context)
        assert hidden is not None, "a stage without embedding needs hidden states"
        out: Tensor = self.transformer(hidden, context, caches)
        return out

    def pooled(self, hidden: Tensor) -> Tensor:
        """The pooled representation of the output of ``forward``, ``(b, h)``."""
        assert self.pooler is not None, "the model was built without a pooler"
        if self.placement.sequence_parallel:
            hidden = gather_from_sequence(hidden, self.placement.group, sum_gradients=False)
        out: Tensor = self.pooler(hidden)
        return out

    def _context(
        self,
        tokens: Tensor,
        positions: Tensor,
        documents: Tensor | None,
        streams: RngStreams | None,
        start: int,
    ) -> LayerContext:
        config = self.config
        slopes = None
        if config.position_embedding == "alibi":
            slopes = self._slopes_on(tokens.device)
        rotary = None
        if config.position_embedding == "rotary":
            dtype = self.placement.dtype
            rotary = RotaryTable.of_positions(positions, config.head_size, dtype)
        return LayerContext(
            positions=self._local_positions(tokens.size(1)),
            bias=AttentionBias(documents, slopes, config.alibi_precision, start),
            rotary=rotary,
            streams=streams,
        )

    def _slopes_on(self, device: torch.device) -> Tensor:
        """The ALiBi slopes of this rank's heads, copied to a device once and not at each pass."""
        if device not in self._slopes:
            slopes = _local_slopes(self.config.num_heads, self.placement.group)
            self._slopes[device] = copy_to_device(slopes, device)
        return self._slopes[device]

    def _local_positions(self, seq: int) -> range:
        if not self.placement.sequence_parallel:
            return range(seq)
        group = self.placement.group
        part = seq // group.size()
        return range(group.rank() * part, (group.rank() + 1) * part)


class BloomForPretraining(nn.Module):
    """The language model and its head, or a stage of them; default: the whole model."""

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement,
        *,
        stage: Stage | None = None,
        backend: Backend,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        stage = whole_model(config) if stage is None else stage
        self.config = config
        self.placement = placement
        self.stage = stage
        self.language_model = TransformerLanguageModel(
            config, placement, stage=stage, backend=backend, recompute=recompute
        )
        self.output_layer: VocabParallelEmbedding | None = None
        if stage.last and not config.tie_embeddings:
            # The rows of an output layer are stored and cut like those of an embedding.
            self.output_layer = _build_word_table(config, placement)
        self.head_chunk: int | None = None
        """Tokens whose logits are in memory at once; None: what the device's memory suggests."""

    def forward(
        self,
        inputs: ModelInputs,
        streams: RngStreams | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Sum of the losses of the tokens, each times its ``loss_weights``; a scalar.

        Args:
            hidden: what the stage before gave, ``(b, s or s/t, h)``; None on the first stage.

        Returns:
            The loss; on a stage that is not the last, hidden states ``(b, s or s/t, h)``.
        """
        hidden = self.language_model(
            inputs.tokens,
            hidden=hidden,
            positions=inputs.positions,
            documents=inputs.documents,
            streams=streams,
        )
        assert hidden is not None
        if not self.stage.last:
            return hidden
        return vocab_parallel_linear_cross_entropy(
            enter_head(hidden, self.placement),
            self.head_weight,
            inputs.targets,
            inputs.loss_weights,
            group=self.placement.group,
            vocab_size=self.config.vocab_size,
            chunk_tokens=self.head_chunk,
        )

    def logits(self, tokens: Tensor, *, caches: Sequence[KeyValueCache] | None = None) -> Tensor:
        """Logits of this rank's part of the padded vocabulary, ``(b, s, vocab / t)``."""
        hidden = self.language_model(tokens, caches=caches)
        return F.linear(enter_head(hidden, self.placement), self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the output layer, ``(vocab / t, h)``."""
        if self.output_layer is not None:
            return self.output_layer.weight
        assert self.language_model.embedding is not None, "only the last stage has the head"
        return self.language_model.embedding.word_embeddings.weight

    def new_hidden(self, batch: int, seq: int) -> Tensor:
        """Room for the hidden states that stages exchange, ``(b, s or s/t, h)``."""
        placement = self.placement
        part = seq // placement.group.size() if placement.sequence_parallel else seq
        device = next(self.parameters()).device
        shape = (batch, part, self.config.hidden_size)
        return torch.empty(shape, dtype=placement.dtype, device=device)

    def new_caches(self, capacity: int) -> list[KeyValueCache]:
        """Empty caches for ``capacity`` tokens, one for each layer."""
        return [KeyValueCache(capacity) for _ in range(self.config.num_layers)]


def enter_head(hidden: Tensor, placement: Placement) -> Tensor:
    """Give the head all positions, ``(b, s or s/t, h)`` -> ``(b, s, h)``; gradients are summed."""
    if placement.sequence_parallel:
        return gather_from_sequence(hidden, placement.group)
    return copy_to_region(hidden, placement.group)


def _local_slopes(num_heads: int, group: ProcessGroup) -> Tensor:
    return alibi_slopes(num_heads).chunk(group.size())[group.rank()]
