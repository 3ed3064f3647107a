"""Seconds of one microbatch through a layer, the embedding and the head on one rank.

    products       by their sizes on one tensor rank; a backward pass has two for each
    streams        layer norms, dropout, activation, copies: the bytes that they read and write
    scores         of attention; of backends that hold them, also as streams
    collectives    what they put on the wire; those of a column-parallel layer's gradient run
                   beside the product of its weight gradient

A backward pass streams twice what the forward pass does: it reads gradients besides. Everything
is in 16-bit numbers, as on GPUs.
"""

from dataclasses import dataclass

from megatron.config import Config
from megatron.planning.cluster import Cluster
from megatron.planning.count import counted_backend
from megatron.planning.kernels import product_seconds, stream_seconds
from megatron.planning.parameters import layer_parameters, vocab_rows

_ITEMSIZE = 2

_FORWARD_KERNELS = 20
"""Of a layer: products, norms, copies, attention; a backward pass has twice as many."""

_FLASH_EFFICIENCY = 0.6
"""Rate of kernels that keep no scores, relative to that of products; the backward pass's is less,
which its five products for the forward pass's two stand for."""

_LOGIT_BYTES = 56
"""Read and written for each logit on the way to loss and gradient, in float32 mostly."""


@dataclass(frozen=True)
class PassTime:
    """Seconds of one microbatch.

    Attributes:
        forward: pass.
        backward: pass, with what it computes again.
        weights: of that, the gradients of the weights.
    """

    forward: float = 0.0
    backward: float = 0.0
    weights: float = 0.0

    def __add__(self, other: "PassTime") -> "PassTime":
        return PassTime(
            self.forward + other.forward,
            self.backward + other.backward,
            self.weights + other.weights,
        )

    def __mul__(self, times: int) -> "PassTime":
        return PassTime(self.forward * times, self.backward * times, self.weights * times)

    @property
    def total(self) -> float:
        return self.forward + self.backward


def layer_time(config: Config, cluster: Cluster) -> PassTime:
    """One transformer layer."""
    products = _product_sizes(config)
    multiplied = [_product(config, cluster, *size) for size in products]
    weights = [_weight_product(config, cluster, *size) for size in products]
    attention_forward, attention_backward = _attention(config, cluster)
    streams = stream_seconds(cluster, _streamed(config))
    launches = _FORWARD_KERNELS * cluster.launch_seconds
    exchange = exchange_seconds(config, cluster)
    forward = sum(multiplied) + attention_forward + streams + launches + 2 * exchange
    backward = sum(_input_product(config, cluster, *size) for size in products)
    backward += attention_backward + 2 * streams + 2 * launches
    backward += _exposed(config, cluster, exchange, weights[::2])
    added = sum(weights) + stream_seconds(cluster, _accumulated(config))
    if config.train.recompute == "full":
        backward += forward
    elif config.train.recompute == "selective":
        backward += attention_forward
    return PassTime(forward, backward + added, added)


def embedding_time(config: Config, cluster: Cluster) -> PassTime:
    """The embedding; its gradient has the size of the table."""
    streams = stream_seconds(cluster, 6 * _ITEMSIZE * _tokens(config) * config.model.hidden_size)
    table = vocab_rows(config) * config.model.hidden_size
    dense = stream_seconds(cluster, table * (2 * _ITEMSIZE + 8))
    exchange = exchange_seconds(config, cluster)
    return PassTime(streams + exchange, 2 * streams + dense)


def head_time(config: Config, cluster: Cluster) -> PassTime:
    """Final norm, logits and loss, whose gradients are computed in the forward pass."""
    tokens, hidden, rows = _tokens(config), config.model.hidden_size, vocab_rows(config)
    products = (
        product_seconds(cluster, tokens, rows, hidden)
        + product_seconds(cluster, tokens, hidden, rows)
        + product_seconds(cluster, rows, hidden, tokens)
    )
    logits = stream_seconds(cluster, _LOGIT_BYTES * tokens * rows)
    streams = stream_seconds(cluster, 8 * _ITEMSIZE * tokens * hidden + 12 * rows * hidden)
    return PassTime(products + logits, streams + exchange_seconds(config, cluster))


def exchange_seconds(config: Config, cluster: Cluster) -> float:
    """An all-reduce of the hidden states over the tensor ranks, or the pair in its place."""
    ranks = config.parallel.tensor
    hidden = _ITEMSIZE * _tokens(config) * config.model.hidden_size
    return 2 * (ranks - 1) / ranks * hidden / cluster.bandwidth(1, ranks)


def _product_sizes(config: Config) -> list[tuple[int, int]]:
    """Inputs and outputs of the linear layers, column- and row-parallel in turn."""
    model, t = config.model, config.parallel.tensor
    h, f = model.hidden_size, model.ffn_size
    up = (2 if model.is_gated else 1) * f
    return [(h, 3 * h // t), (h // t, h), (h, up // t), (f // t, h)]


def _product(config: Config, cluster: Cluster, inputs: int, outputs: int) -> float:
    return product_seconds(cluster, _tokens(config), outputs, inputs)


def _input_product(config: Config, cluster: Cluster, inputs: int, outputs: int) -> float:
    return product_seconds(cluster, _tokens(config), inputs, outputs)


def _weight_product(config: Config, cluster: Cluster, inputs: int, outputs: int) -> float:
    return product_seconds(cluster, outputs, inputs, _tokens(config))


def _exposed(config: Config, cluster: Cluster, exchange: float, beside: list[float]) -> float:
    """What of a backward pass's collectives does not fit beside the weight gradients.

    With sequence parallelism, the half of each pair that gathers is waited for.
    """
    if not cluster.overlaps:
        return 2 * exchange
    if config.parallel.sequence:
        return exchange + sum(max(0.0, exchange / 2 - product) for product in beside)
    return sum(max(0.0, exchange - product) for product in beside)


def _streamed(config: Config) -> float:
    """Bytes that the forward pass reads and writes besides products and scores."""
    model, t = config.model, config.parallel.tensor
    tokens = _tokens(config)
    here = tokens * model.hidden_size / (t if config.parallel.sequence else 1)
    numbers = 10 * here + (2 + model.is_gated) * tokens * model.ffn_size / t
    numbers += 2 * tokens * model.hidden_size / t
    if counted_backend(config) == "sdpa" and model.position_embedding == "alibi":
        numbers += 6 * tokens * model.hidden_size / t
    masks = 2 * here if model.hidden_dropout > 0 else 0
    return _ITEMSIZE * numbers + masks


def _accumulated(config: Config) -> float:
    """Bytes read and written to add a gradient of the weights to that of the step."""
    numbers = sum(one.count * one.size for one in layer_parameters(config))
    return numbers * (_ITEMSIZE + 8)


def _attention(config: Config, cluster: Cluster) -> tuple[float, float]:
    """Scores, softmax and weighted values, forward and backward."""
    model, seq = config.model, config.model.seq_length
    heads = config.train.least_micro_batch_size * model.num_heads // config.parallel.tensor
    backend = counted_backend(config)
    if backend in ("explicit", "blocked"):
        # Blocks leave out the half that is masked, and keep the others in float32.
        share, itemsize = (1.0, _ITEMSIZE) if backend == "explicit" else (0.5, 4)
        products = share * (
            product_seconds(cluster, seq, seq, model.head_size, batch=heads)
            + product_seconds(cluster, seq, model.head_size, seq, batch=heads)
        )
        dropped = 2 * itemsize + 1 if model.attention_dropout > 0 else 0
        scores = share * heads * seq * seq
        forward = stream_seconds(cluster, scores * (4 * itemsize + dropped))
        backward = stream_seconds(cluster, scores * (7 * itemsize + dropped))
        return products + forward, 2 * products + backward
    operations = heads * seq * seq * model.head_size
    rate = cluster.peak_flops * cluster.kernel_efficiency * _FLASH_EFFICIENCY
    # Two products of half the scores, and five.
    return 2 * operations / rate, 5 * operations / rate


def _tokens(config: Config) -> int:
    return config.train.least_micro_batch_size * config.model.seq_length
