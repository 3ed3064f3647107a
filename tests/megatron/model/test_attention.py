"""Both backends of the attention core against its definition in float64, with all gradients.

In float64 they must agree to 1e-12. In lower precision an error is unavoidable: the yardstick is
that of explicit attention without ALiBi in the same dtype, which ALiBi may not multiply.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron.config import AlibiPrecision, AttentionBackend, ModelConfig, PositionEmbedding
from megatron.model.alibi import alibi_slopes, bloom_bf16_bias
from megatron.model.attention import (
    AttentionBias,
    AttentionDropout,
    Backend,
    attention,
    choose_backend,
)
from megatron.model.fused_softmax import causal_mask
from tests.figures import Figure
from tests.megatron.model.sample import with_options

BACKENDS: list[Backend] = ["explicit", "sdpa"]
PRECISIONS: list[AlibiPrecision] = ["exact", "bloom_bf16"]
HEAD_SIZES = [64, 80, 96, 128]
EXACT = 1e-12
# How far ALiBi may raise the error of attention in low precision.
MULTIPLE = 1.5
LENGTH = 300
# Scores with a bias of up to half of the length are summed in float32.
SUM_ROUNDING = LENGTH / 2 * 2**-24


def inputs(
    heads: int, queries: int, keys: int, size: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Query, key, value and gradient of the output, for a batch of two."""
    lengths = (queries, keys, keys, queries)
    tensors = [torch.randn(2, heads, n, size, dtype=torch.float64).to(dtype) for n in lengths]
    return [tensor.requires_grad_() for tensor in tensors[:3]] + tensors[3:]


def plain_attention(query: Tensor, key: Tensor, value: Tensor, bias: AttentionBias) -> Tensor:
    """The definition, with the bias of each pair of positions written out."""
    queries, keys = query.size(-2), key.size(-2)
    i = torch.arange(bias.query_start, bias.query_start + queries).unsqueeze(-1)
    j = torch.arange(keys)
    scores = query @ key.mT / math.sqrt(query.size(-1))
    if bias.slopes is not None and bias.alibi_precision == "exact":
        scores = scores - bias.slopes.double()[:, None, None] * (i - j)
    elif bias.slopes is not None:
        scores = scores + bloom_bf16_bias(bias.slopes, keys).double().unsqueeze(1)
    visible = j <= i if bias.visible is None else bias.visible
    return torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1) @ value


def with_gradients(
    backend: Backend | None, tensors: Sequence[Tensor], bias: AttentionBias
) -> list[Tensor]:
    """Output and gradients of query, key and value; by the definition if there is no backend."""
    query, key, value, grad = tensors
    if backend is None:
        query, key, value = (t.detach().double().requires_grad_() for t in (query, key, value))
        out = plain_attention(query, key, value, bias)
    else:
        out = attention(query, key, value, bias, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), grad.to(out.dtype))]


def check_both(tensors: Sequence[Tensor], bias: AttentionBias) -> None:
    """Both backends in float64 against the definition."""
    want = with_gradients(None, tensors, bias)
    for backend in BACKENDS:
        for a, b in zip(with_gradients(backend, tensors, bias), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=EXACT)


def errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    """Root mean square errors relative to the size of what is wanted."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]


def document_mask(lengths: Sequence[int]) -> Tensor:
    """Who sees whom in two samples of documents, the second in reverse order."""
    orders = (lengths, lengths[::-1])
    documents = torch.stack(
        [torch.arange(len(order)).repeat_interleave(torch.tensor(order)) for order in orders]
    )
    seq = documents.size(1)
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return (same & causal_mask(seq, seq, 0, documents.device)).unsqueeze(1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_backends_equal_the_definition(size: int, precision: AlibiPrecision) -> None:
    check_both(inputs(8, 147, 147, size), AttentionBias(None, alibi_slopes(8), precision))


@pytest.mark.parametrize("size", [5, 64])
def test_backends_equal_the_definition_without_alibi(size: int) -> None:
    check_both(inputs(3, 131, 131, size), AttentionBias())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tensor", [2, 4])
def test_heads_of_one_rank_attend_as_among_all(tensor: int, precision: AlibiPrecision) -> None:
    tensors, slopes = inputs(12, 61, 61, 16), alibi_slopes(12)
    whole = with_gradients(None, tensors, AttentionBias(None, slopes, precision))
    for rank in range(tensor):
        parts = [t.chunk(tensor, dim=1)[rank] for t in tensors]
        bias = AttentionBias(None, slopes.chunk(tensor)[rank], precision)
        for backend in BACKENDS:
            got = with_gradients(backend, parts, bias)
            for a, b in zip(got, whole, strict=True):
                torch.testing.assert_close(a, b.chunk(tensor, dim=1)[rank], rtol=0, atol=EXACT)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_documents_are_closed_to_one_another(precision: AlibiPrecision) -> None:
    visible = document_mask([1, 70, 2, 60])
    check_both(inputs(4, 133, 133, 64), AttentionBias(visible, alibi_slopes(4), precision))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("queries", [1, 30])
def test_queries_after_cached_keys_see_them(queries: int, precision: AlibiPrecision) -> None:
    bias = AttentionBias(None, alibi_slopes(4), precision, query_start=140 - queries)
    check_both(inputs(4, queries, 140, 64), bias)


def test_bias_is_precise_at_far_positions() -> None:
    # The positions of the first keys are far from those of the queries, in bfloat16 too.
    bias = AttentionBias(None, alibi_slopes(16), "exact", query_start=5000)
    check_both(inputs(16, 3, 5003, 8), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_alibi_costs_no_precision(size: int, dtype: torch.dtype, figure: Figure) -> None:
    tensors = inputs(8, LENGTH, LENGTH, size, dtype)
    plain = AttentionBias()
    limit = errors(with_gradients("explicit", tensors, plain), with_gradients(None, tensors, plain))
    measured = {"without": max(limit)}
    # Explicit scores are rounded after the bias under bloom_bf16, as the published models' were.
    cases: list[tuple[Backend, AlibiPrecision]] = [
        ("explicit", "exact"),
        ("sdpa", "exact"),
        ("sdpa", "bloom_bf16"),
    ]
    for backend, precision in cases:
        bias = AttentionBias(None, alibi_slopes(8), precision)
        want = with_gradients(None, tensors, bias)
        found = errors(with_gradients(backend, tensors, bias), want)
        measured[f"{backend}_{precision}"] = max(found)
        assert all(a <= MULTIPLE * b + SUM_ROUNDING for a, b in zip(found, limit, strict=True))
    figure(f"attention, head size {size}, {dtype}: error of", **measured)


def test_bloom_bf16_scores_are_rounded_with_their_bias_in_them() -> None:
    query, key, value, _ = inputs(4, 90, 90, 16, torch.bfloat16)
    bias = AttentionBias(None, alibi_slopes(4), "bloom_bf16")
    got = attention(query, key, value, bias, backend="explicit")
    table = bloom_bf16_bias(alibi_slopes(4), 90).float().unsqueeze(1)
    scores = (query.float() @ key.float().mT / 4 + table).bfloat16().float()
    visible = causal_mask(90, 90, 0, scores.device)
    probabilities = torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1).bfloat16()
    torch.testing.assert_close(got, probabilities @ value, rtol=2**-7, atol=2**-8)
    exact = plain_attention(query.double(), key.double(), value.double(), bias)
    rounded = (probabilities @ value).double()
    # Not just near to the exact result: much nearer to the one that is rounded in the same places.
    assert (got - rounded).norm() < (rounded - exact).norm() / 4


def test_dropout_of_probabilities_is_explicit_only() -> None:
    query, key, value, _ = inputs(2, 6, 6, 8)
    keys = torch.arange(24).view(2, 2, 6)
    drop = AttentionDropout(0.5, keys)
    dropped = attention(
        query, key, value, AttentionBias(), backend="explicit", attention_dropout=drop
    )
    assert not torch.equal(
        dropped, attention(query, key, value, AttentionBias(), backend="explicit")
    )
    with pytest.raises(ValueError, match="sdpa has no dropout"):
        attention(query, key, value, AttentionBias(), backend="sdpa", attention_dropout=drop)


@pytest.mark.parametrize(
    ("backend", "positions", "precision", "dropout", "want"),
    [
        ("auto", "alibi", "exact", 0.0, "sdpa"),
        ("auto", "alibi", "bloom_bf16", 0.0, "explicit"),
        ("auto", "rotary", "bloom_bf16", 0.0, "sdpa"),
        ("auto", "alibi", "exact", 0.1, "explicit"),
        ("explicit", "alibi", "exact", 0.0, "explicit"),
        ("sdpa", "alibi", "bloom_bf16", 0.0, "sdpa"),
    ],
)
def test_auto_takes_sdpa_where_it_can(
    backend: AttentionBackend,
    positions: PositionEmbedding,
    precision: AlibiPrecision,
    dropout: float,
    want: Backend,
) -> None:
    config: ModelConfig = replace(
        with_options(position_embedding=positions),
        alibi_precision=precision,
        attention_backend=backend,
        attention_dropout=dropout,
    )
    assert choose_backend(config) == want
