"""What the forward pass of one microbatch keeps for the backward pass, in bytes.

After Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models", for
the tensors that this implementation keeps. With T tokens of hidden size h, MLP width f and
attention width h on t tensor ranks, in numbers of the precision of the computation, and r = t with
sequence parallelism, else 1:

    input of a layer norm, twice                T h / r
    its output, gathered, twice                 T h
    queries, keys, values, output of attention  4 T h / t     more where the backend copies
    scores                                      as the backend needs them
    MLP, before and after the activation        2 T f / t     gated: 4, liglu 3
    dropout of hidden states, twice             T h / r bytes

Recomputation drops the scores and what attention copies (selective), or all but the input of the
layer (full).
"""

from megatron.config import Backend, Config, ModelConfig
from megatron.model.stages import Stage
from megatron.planning.parameters import main_dtype, vocab_rows

_WIDENED = 8
"""Columns that the backend sdpa appends to carry ALiBi."""

_BLOCK = 128
"""Queries of a block of the backend blocked."""


def backend_of(model: ModelConfig) -> Backend:
    """The attention backend on a GPU: of auto, one that keeps no scores, where there is one."""
    if model.attention_backend != "auto":
        return model.attention_backend
    if model.attention_dropout > 0 or model.rounds_scores:
        return "blocked"
    return "sdpa"


def kept_by_stage(config: Config, stage: Stage) -> int:
    """Of one microbatch through a stage."""
    total = len(stage.layers) * kept_by_layer(config)
    hidden, here = _hidden(config), _hidden_here(config)
    if stage.first:
        if config.model.embedding_layernorm:
            total += here + _norm_bytes(config)
        total += _dropout_bytes(config)
    if stage.last:
        # The loss keeps the gradients that it has computed already.
        weight = vocab_rows(config) * config.model.hidden_size * main_dtype(config).itemsize
        total += here + _norm_bytes(config) + hidden + weight
    return total


def kept_by_layer(config: Config) -> int:
    """Of one microbatch through a layer."""
    if config.train.recompute == "full":
        return _hidden_here(config)
    norms = 2 * (_hidden_here(config) + _norm_bytes(config) + _hidden(config))
    return norms + _attention(config) + _mlp(config) + 2 * _dropout_bytes(config)


def recomputed_by_layer(config: Config) -> int:
    """What the backward pass of a layer computes again, and needs beside what was kept."""
    if config.train.recompute == "full":
        model = config.model
        mlp, norms = _mlp(config), 2 * (_norm_bytes(config) + _hidden(config))
        scores = _scores(config, backend_of(model)) + _projections(config, backend_of(model))
        return norms + scores + mlp + 2 * _dropout_bytes(config) + _hidden_here(config)
    if config.train.recompute == "selective":
        return _scores(config, backend_of(config.model))
    return 0


def deferred_by_layer(config: Config) -> int:
    """Inputs and output gradients of the products whose weight gradients are put off."""
    widths = 3 * config.model.hidden_size + (2 + config.model.is_gated) * config.model.ffn_size
    cut = widths // config.parallel.tensor + config.model.hidden_size // config.parallel.tensor
    return 4 * _hidden(config) + _tokens(config) * cut * config.train.torch_dtype.itemsize


def _attention(config: Config) -> int:
    """From the product that makes queries, keys and values to the input of the one after."""
    backend = backend_of(config.model)
    if config.train.recompute == "selective":
        return 4 * _hidden(config) // config.parallel.tensor
    return _projections(config, backend) + _scores(config, backend)


def _projections(config: Config, backend: Backend) -> int:
    model, part = config.model, _hidden(config) // config.parallel.tensor
    if backend == "sdpa" and model.position_embedding == "alibi":
        return part + 4 * part * (model.head_size + _WIDENED) // model.head_size
    return 4 * part


def _scores(config: Config, backend: Backend) -> int:
    model, dtype = config.model, config.train.torch_dtype
    heads = config.train.least_micro_batch_size * model.num_heads // config.parallel.tensor
    seq = model.seq_length
    if backend == "explicit":
        # Probabilities; under dropout also which of them, and what is left of them.
        dropped = 1 + dtype.itemsize if model.attention_dropout > 0 else 0
        return heads * seq * seq * (dtype.itemsize + dropped)
    if backend == "blocked":
        pairs = sum(min(start + _BLOCK, seq) * min(_BLOCK, seq - start) for start in _starts(seq))
        return heads * pairs * main_dtype(config).itemsize
    return heads * seq * main_dtype(config).itemsize


def _starts(seq: int) -> range:
    return range(0, seq, _BLOCK)


def _mlp(config: Config) -> int:
    model = config.model
    widths = {"gelu": 2, "liglu": 3}.get(model.activation, 4)
    width = widths * model.ffn_size // config.parallel.tensor
    return _tokens(config) * width * config.train.torch_dtype.itemsize


def _dropout_bytes(config: Config) -> int:
    """A byte for each element of the hidden states here, if there is dropout of them."""
    if config.model.hidden_dropout == 0:
        return 0
    return _hidden_here(config) // config.train.torch_dtype.itemsize


def _norm_bytes(config: Config) -> int:
    """Mean and inverse deviation of each token that is here."""
    return 2 * main_dtype(config).itemsize * _tokens(config) // _parts(config)


def _hidden_here(config: Config) -> int:
    """Hidden states between parallel layers."""
    return _hidden(config) // _parts(config)


def _parts(config: Config) -> int:
    return config.parallel.tensor if config.parallel.sequence else 1


def _hidden(config: Config) -> int:
    return _tokens(config) * config.model.hidden_size * config.train.torch_dtype.itemsize


def _tokens(config: Config) -> int:
    return config.train.least_micro_batch_size * config.model.seq_length
