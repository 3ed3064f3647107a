"""The backends of attention that a CPU runs against the definition in float64, with all gradients.

In float64 they must agree to 1e-12. In lower precision an error is unavoidable: the yardstick is
that of explicit attention without ALiBi in the same dtype, which ALiBi may not multiply.
"""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from megatron.config import AlibiPrecision
from megatron.model.alibi import alibi_slopes, bloom_bf16_bias
from megatron.model.attention import AttentionBias, AttentionDropout, Backend, attention, runs_on
from megatron.model.fused_softmax import causal_mask
from mpu import RngStreams
from tests.figures import Figure
from tests.megatron.model.attending import (
    EXACT,
    document_numbers,
    errors,
    inputs,
    plain_attention,
    with_gradients,
)

BACKENDS: list[Backend] = ["explicit", "blocked", "sdpa"]
ROUNDING_BACKENDS: list[Backend] = ["explicit", "blocked"]
PRECISIONS: list[AlibiPrecision] = ["exact", "bloom_bf16"]
HEAD_SIZES = [64, 80, 96, 128]
# How far ALiBi may raise the error of attention in low precision.
MULTIPLE = 1.5
LENGTH = 300
# Scores with a bias of up to half of the length are summed in float32.
SUM_ROUNDING = LENGTH / 2 * 2**-24

Check = Callable[[Sequence[Tensor], AttentionBias], None]


@pytest.fixture
def check(figure: Figure) -> Check:
    """Compare all backends in float64 with the definition."""

    def compare(tensors: Sequence[Tensor], bias: AttentionBias) -> None:
        want = with_gradients(None, tensors, bias)
        for backend in BACKENDS:
            got = with_gradients(backend, tensors, bias)
            worst = max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))
            figure(f"attention in float64, {backend}", error=worst)
            assert worst < EXACT, backend

    return compare


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_backends_equal_the_definition(check: Check, size: int, precision: AlibiPrecision) -> None:
    check(inputs(8, 147, 147, size), AttentionBias(None, alibi_slopes(8), precision))


@pytest.mark.parametrize("size", [5, 64])
def test_backends_equal_the_definition_without_alibi(check: Check, size: int) -> None:
    check(inputs(3, 131, 131, size), AttentionBias())


@pytest.mark.parametrize("length", [1, 127, 128, 129, 256, 301])
def test_any_length_equals_the_definition(check: Check, length: int) -> None:
    check(inputs(2, length, length, 16), AttentionBias(slopes=alibi_slopes(2)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_heads_need_not_be_a_power_of_two(check: Check, precision: AlibiPrecision) -> None:
    check(inputs(112, 135, 135, 8), AttentionBias(None, alibi_slopes(112), precision))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tensor", [2, 4])
def test_heads_of_one_rank_attend_as_among_all(tensor: int, precision: AlibiPrecision) -> None:
    tensors, slopes = inputs(12, 131, 131, 16), alibi_slopes(12)
    whole = with_gradients(None, tensors, AttentionBias(None, slopes, precision))
    for rank in range(tensor):
        parts = [t.chunk(tensor, dim=1)[rank] for t in tensors]
        bias = AttentionBias(None, slopes.chunk(tensor)[rank], precision)
        for backend in BACKENDS:
            got = with_gradients(backend, parts, bias)
            for a, b in zip(got, whole, strict=True):
                torch.testing.assert_close(a, b.chunk(tensor, dim=1)[rank], rtol=0, atol=EXACT)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_documents_are_closed_to_one_another(check: Check, precision: AlibiPrecision) -> None:
    documents = document_numbers([1, 70, 2, 60, 130])
    check(inputs(4, 263, 263, 64), AttentionBias(documents, alibi_slopes(4), precision))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("queries", [1, 30, 200])
def test_queries_after_cached_keys_see_them(
    check: Check, queries: int, precision: AlibiPrecision
) -> None:
    bias = AttentionBias(None, alibi_slopes(4), precision, query_start=240 - queries)
    check(inputs(4, queries, 240, 64), bias)


def test_bias_is_precise_at_far_positions(check: Check) -> None:
    # The positions of the first keys are far from those of the queries, in bfloat16 too.
    bias = AttentionBias(None, alibi_slopes(16), "exact", query_start=5000)
    check(inputs(16, 3, 5003, 8), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_alibi_costs_no_precision(size: int, dtype: torch.dtype, figure: Figure) -> None:
    tensors = inputs(8, LENGTH, LENGTH, size, dtype)
    plain = AttentionBias()
    limit = errors(with_gradients("explicit", tensors, plain), with_gradients(None, tensors, plain))
    measured = {"without": max(limit)}
    # Explicit and blocked scores are rounded after the bias under bloom_bf16, as the published
    # models' were.
    cases: list[tuple[Backend, AlibiPrecision]] = [
        ("explicit", "exact"),
        ("blocked", "exact"),
        ("sdpa", "exact"),
        ("sdpa", "bloom_bf16"),
    ]
    for backend, precision in cases:
        bias = AttentionBias(None, alibi_slopes(8), precision)
        want = with_gradients(None, tensors, bias)
        found = errors(with_gradients(backend, tensors, bias), want)
        measured[f"{backend}_{precision}"] = max(found)
        assert all(a <= MULTIPLE * b + SUM_ROUNDING for a, b in zip(found, limit, strict=True))
    if dtype == torch.bfloat16:
        # In fp32 both are off by the order of their sums, which the processor decides.
        assert measured["blocked_exact"] <= 1.02 * measured["explicit_exact"]
    figure(f"attention, head size {size}, {dtype}: error of", **measured)


@pytest.mark.parametrize("backend", ROUNDING_BACKENDS)
def test_bloom_bf16_scores_are_rounded_with_their_bias_in_them(backend: Backend) -> None:
    query, key, value, _ = inputs(4, 190, 190, 16, torch.bfloat16)
    bias = AttentionBias(None, alibi_slopes(4), "bloom_bf16")
    got = attention(query, key, value, bias, backend=backend)
    table = bloom_bf16_bias(alibi_slopes(4), 190).float().unsqueeze(1)
    scores = (query.float() @ key.float().mT / 4 + table).bfloat16().float()
    visible = causal_mask(190, 190, 0, scores.device)
    probabilities = torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1).bfloat16()
    torch.testing.assert_close(got, probabilities @ value, rtol=2**-7, atol=2**-8)
    exact = plain_attention(query.double(), key.double(), value.double(), bias)
    rounded = (probabilities @ value).double()
    # Not just near to the exact result: much nearer to the one that is rounded in the same places.
    assert (got - rounded).norm() < (rounded - exact).norm() / 4


@pytest.mark.parametrize("documents", [None, document_numbers([30, 150, 1])])
@pytest.mark.parametrize("p", [0.1, 0.7])
def test_dropout_drops_the_same_probabilities_in_both_backends(
    p: float, documents: Tensor | None
) -> None:
    query, key, value, grad = inputs(3, 181, 181, 8)
    keys = RngStreams(5, torch.tensor([2, 9])).keys(1, axes=[range(3), range(181)])
    bias = AttentionBias(documents, alibi_slopes(3))
    results = []
    for backend in ROUNDING_BACKENDS:
        out = attention(
            query, key, value, bias, backend=backend, attention_dropout=AttentionDropout(p, keys)
        )
        results.append([out.detach(), *torch.autograd.grad(out, (query, key, value), grad)])
    whole = attention(query, key, value, bias, backend="explicit")
    assert (results[0][0] - whole).abs().mean() > 0.05
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT)


@pytest.mark.parametrize("backend", ["sdpa", "flex", "flash"])
def test_dropout_is_refused_by_backends_without_it(backend: Backend) -> None:
    query, key, value, _ = inputs(2, 6, 6, 8)
    drop = AttentionDropout(0.5, torch.arange(24).view(2, 2, 6))
    with pytest.raises(ValueError, match=f"{backend} has no dropout; use explicit or blocked"):
        attention(query, key, value, AttentionBias(), backend=backend, attention_dropout=drop)


@pytest.mark.parametrize("backend", ["flex", "flash"])
def test_cached_keys_are_refused_by_backends_of_training(backend: Backend) -> None:
    query, key, value, _ = inputs(2, 1, 6, 8)
    with pytest.raises(ValueError, match=f"{backend} takes no cached keys; use blocked"):
        attention(query, key, value, AttentionBias(query_start=5), backend=backend)


def test_backends_that_need_a_gpu_do_not_run_on_a_cpu() -> None:
    able = {backend: runs_on(backend, torch.device("cpu")) for backend in (*BACKENDS, "flex")}
    assert able == {"explicit": True, "blocked": True, "sdpa": True, "flex": False}
    assert runs_on("flex", torch.device("cuda"))
