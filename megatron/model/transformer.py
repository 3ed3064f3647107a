"""The transformer: parallel MLP and attention, their layer, and the stack of layers.

    x --> LN --> attention --> dropout --(+)--> LN --> MLP --> dropout --(+)-->
     \\___________________________________/ \\________________________________/

Which weight of a layer is cut how over the tensor group:

    self_attention.query_key_value   columns: whole heads, rows ordered (head, q k v, head_size)
    self_attention.dense             rows: the inputs that come from this rank's heads
    mlp.dense_h_to_4h                columns; a gated unit's halves each by themselves
    mlp.dense_4h_to_h                rows
    layer norms, biases of the two row-parallel layers: whole on every rank

Letters: b batch, s sequence, n this rank's heads, d head size, h hidden size, t tensor group size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron.config import Backend, ModelConfig, Recompute
from megatron.model.activations import activate
from megatron.model.attention import AttentionBias, AttentionDropout, attention
from megatron.model.fusion import bias_dropout_add
from megatron.model.placement import Placement, build_layer_norm
from megatron.model.rotary import RotaryTable
from megatron.model.stages import Stage
from mpu import ColumnParallelLinear, RngStreams, RowParallelLinear


class DropoutSite(IntEnum):
    """Which dropout of a layer a random number belongs to."""

    EMBEDDING = 0
    ATTENTION = 1
    ATTENTION_OUTPUT = 2
    MLP_OUTPUT = 3


@dataclass(frozen=True)
class LayerContext:
    """What all layers of one forward pass share.

    Attributes:
        positions: the positions of the sequence that this rank holds between parallel layers.
        bias: who attends to whom.
        rotary: rotation of queries and keys; None is no rotation.
        streams: random numbers of dropout; None is no dropout.
    """

    positions: range
    bias: AttentionBias
    rotary: RotaryTable | None = None
    streams: RngStreams | None = None

    def dropout_keys(self, p: float, layer: int, site: DropoutSite) -> Tensor | None:
        """Keys ``(b, s or s/t)`` of the dropout of hidden states; None if there is no dropout.

        They are the same whichever ranks hold the hidden states.
        """
        if p == 0 or self.streams is None:
            return None
        return self.streams.keys(layer, site, axes=[self.positions])


@dataclass
class KeyValueCache:
    """Keys and values of the tokens that one layer has seen, ``(b, n, up to capacity, d)``."""

    capacity: int
    length: int = 0
    _buffers: list[Tensor] = field(default_factory=list)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens and return those of all."""
        if not self._buffers:
            batch, heads, _, size = key.shape
            self._buffers = [key.new_empty(batch, heads, self.capacity, size) for _ in range(2)]
        end = self.length + key.size(2)
        for buffer, new in zip(self._buffers, (key, value), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        keys, values = (buffer[:, :, :end] for buffer in self._buffers)
        return keys, values


class ParallelMLP(nn.Module):
    """``(b, s, h)`` -> ``(b, s, h)`` without the last bias, which the caller adds."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        super().__init__()
        self.activation = config.activation
        halves = 2 if config.is_gated else 1
        options = placement.linear_options
        self.dense_h_to_4h = ColumnParallelLinear(
            config.hidden_size,
            halves * config.ffn_size,
            num_blocks=halves,
            skip_bias_add=True,
            **options,
        )
        self.dense_4h_to_h = RowParallelLinear(
            config.ffn_size, config.hidden_size, skip_bias_add=True, **options
        )

    def forward(self, x: Tensor) -> Tensor:
        bias = self.dense_h_to_4h.bias
        assert bias is not None
        y: Tensor = self.dense_4h_to_h(activate(self.dense_h_to_4h(x), bias, self.activation))
        return y


class ParallelAttention(nn.Module):
    """``(b, s, h)`` -> ``(b, s, h)`` without the last bias, which the caller adds."""

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement,
        *,
        layer: int,
        backend: Backend,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.recompute = recompute
        self.head_size = config.head_size
        self.dropout = config.attention_dropout
        self.backend = backend
        num_heads = config.num_heads // placement.group.size()
        first_head = placement.group.rank() * num_heads
        self.heads = range(first_head, first_head + num_heads)
        size = config.hidden_size
        options = placement.linear_options
        self.query_key_value = ColumnParallelLinear(size, 3 * size, **options)
        self.dense = RowParallelLinear(size, size, skip_bias_add=True, **options)

    def forward(
        self, x: Tensor, context: LayerContext, cache: KeyValueCache | None = None
    ) -> Tensor:
        fused = self.query_key_value(x)  # (b, s, n * 3 * d)
        batch, seq, _ = fused.shape
        heads = fused.view(batch, seq, len(self.heads), 3, self.head_size)
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(dim=3))  # (b, n, s, d)
        if context.rotary is not None:
            query, key = context.rotary.rotate(query), context.rotary.rotate(key)
        if cache is not None:
            key, value = cache.append(key, value)
        if self.recompute and torch.is_grad_enabled():
            out = _recomputed(self._core, query, key, value, context)
        else:
            out = self._core(query, key, value, context)
        y: Tensor = self.dense(out.transpose(1, 2).reshape(batch, seq, -1))
        return y

    def _core(self, query: Tensor, key: Tensor, value: Tensor, context: LayerContext) -> Tensor:
        """``(b, n, queries, d)`` and keys and values -> ``(b, n, queries, d)``."""
        random = None
        if self.dropout > 0 and context.streams is not None:
            axes = [self.heads, range(query.size(2))]
            keys = context.streams.keys(self.layer, DropoutSite.ATTENTION, axes=axes)
            random = AttentionDropout(self.dropout, keys)
        return attention(
            query, key, value, context.bias, backend=self.backend, attention_dropout=random
        )


class ParallelTransformerLayer(nn.Module):
    """One layer, ``(b, s or s/t, h)`` -> the same."""

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement,
        *,
        layer: int,
        backend: Backend,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.dropout = config.hidden_dropout
        self.input_layernorm = build_layer_norm(config, placement)
        self.self_attention = ParallelAttention(
            config, placement, layer=layer, backend=backend, recompute=recompute == "selective"
        )
        self.post_attention_layernorm = build_layer_norm(config, placement)
        self.mlp = ParallelMLP(config, placement)

    def forward(
        self, x: Tensor, context: LayerContext, cache: KeyValueCache | None = None
    ) -> Tensor:
        attended = self.self_attention(self.input_layernorm(x), context, cache)
        bias = self.self_attention.dense.bias
        x = self._add(x, attended, bias, context, DropoutSite.ATTENTION_OUTPUT)
        y = self.mlp(self.post_attention_layernorm(x))
        bias = self.mlp.dense_4h_to_h.bias
        return self._add(x, y, bias, context, DropoutSite.MLP_OUTPUT)

    def _add(
        self,
        residual: Tensor,
        x: Tensor,
        bias: Tensor | None,
        context: LayerContext,
        site: DropoutSite,
    ) -> Tensor:
        """Bias, dropout and residual."""
        assert bias is not None
        keys = context.dropout_keys(self.dropout, self.layer, site)
        return bias_dropout_add(x, bias, residual, self.dropout, keys)


class ParallelTransformer(nn.Module):
    """The layers of a stage, and in the last one the final norm, ``(b, s or s/t, h)`` -> the same.

    Layers have the same names on whichever stage they are.
    """

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
        self.recompute = recompute
        self.layers = nn.ModuleDict(
            {
                str(layer): ParallelTransformerLayer(
                    config, placement, layer=layer, backend=backend, recompute=recompute
                )
                for layer in stage.layers
            }
        )
        self.final_layernorm = build_layer_norm(config, placement) if stage.last else None

    def forward(
        self, x: Tensor, context: LayerContext, caches: Sequence[KeyValueCache] | None = None
    ) -> Tensor:
        for index, layer in enumerate(self.layers.values()):
            if caches is not None:
                x = layer(x, context, caches[index])
            elif self.recompute == "full" and torch.is_grad_enabled():
                x = _recomputed(layer, x, context)
            else:
                x = layer(x, context)
        return x if self.final_layernorm is None else self.final_layernorm(x)


def _recomputed(function: Callable[..., Tensor], *args: object) -> Tensor:
    """Call ``function``; its activations are dropped, and computed again in the backward pass.

    Dropout repeats itself by its keys, so that no state of a generator has to be kept.
    """
    out: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return out
