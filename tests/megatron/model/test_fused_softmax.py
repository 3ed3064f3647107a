"""FusedScaleMaskSoftmax against the same computation, row by row, in float64."""

import logging

import pytest
import torch
from torch import Tensor

from megatron.model import fused_softmax
from megatron.model.fused_softmax import FusedScaleMaskSoftmax, causal_mask

SCALE = 0.37
# Of the same computation in float64, relative to probabilities of at most 1.
BOUNDS = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def by_rows(scores: Tensor, visible: Tensor, slopes: Tensor | None, start: int) -> Tensor:
    """The probabilities, of the visible keys of each row alone."""
    batch, heads, queries, keys = scores.shape
    out = torch.zeros(scores.shape, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (batch, heads, queries))).tolist():
        row = SCALE * scores[b, h, i].double()
        if slopes is not None:
            row -= slopes[h].double() * (start + i - torch.arange(keys))
        seen = visible.expand(batch, 1, queries, keys)[b, 0, i]
        out[b, h, i, seen] = torch.softmax(row[seen], dim=0)
    return out


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("with_slopes", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (13, 13), (3, 29), (1, 31)])
def test_causal_softmax_is_the_plain_one(
    queries: int, keys: int, with_slopes: bool, dtype: torch.dtype
) -> None:
    scores = (4 * torch.randn(2, 3, queries, keys)).to(dtype)
    slopes = torch.tensor([0.5, 0.25, 0.125]) if with_slopes else None
    start = keys - queries
    got = FusedScaleMaskSoftmax(SCALE)(scores, slopes=slopes, query_start=start)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(start)
    want = by_rows(scores, visible, slopes, start)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= BOUNDS[dtype]
    assert (got[..., ~visible] == 0).all()


@pytest.mark.parametrize("mask_batch", [1, 2])
def test_given_mask_replaces_the_causal_one(mask_batch: int) -> None:
    scores = torch.randn(2, 3, 7, 11, dtype=torch.float64)
    visible = torch.rand(mask_batch, 1, 7, 11) < 0.5
    visible[..., 4] = True
    got = FusedScaleMaskSoftmax(SCALE)(scores, visible=visible)
    torch.testing.assert_close(got, by_rows(scores, visible, None, 0), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_query_that_sees_nothing_attends_to_all_alike(dtype: torch.dtype) -> None:
    scores = torch.randn(1, 2, 4, 8).to(dtype)
    visible = torch.ones(1, 1, 4, 8, dtype=torch.bool).tril()
    visible[0, 0, 2] = False
    got = FusedScaleMaskSoftmax(SCALE)(scores, visible=visible, slopes=torch.tensor([0.5, 0.25]))
    assert torch.equal(got[:, :, 2], torch.full((1, 2, 8), 1 / 8, dtype=dtype))


def test_gradient_is_that_of_the_plain_softmax() -> None:
    scores = torch.randn(2, 3, 5, 9, dtype=torch.float64, requires_grad=True)
    slopes = torch.tensor([0.5, 0.25, 0.125])
    grad = torch.randn_like(scores)
    softmax = FusedScaleMaskSoftmax(SCALE)
    got = softmax(scores, slopes=slopes, query_start=4)
    (dscores,) = torch.autograd.grad(got, scores, grad)
    probabilities = got.detach()
    inner = (grad * probabilities).sum(-1, keepdim=True)
    want = SCALE * probabilities * (grad - inner)
    torch.testing.assert_close(dscores, want, rtol=0, atol=1e-15)


def test_log_says_once_what_computes_the_softmax(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron"), "propagate", True)
    caplog.set_level(logging.INFO, logger="megatron")
    fused_softmax._has_kernels.cache_clear()
    for _ in range(2):
        FusedScaleMaskSoftmax(SCALE)(torch.zeros(1, 1, 2, 2))
    assert caplog.messages == ["attention softmax on cpu: torch"]


def test_causal_mask_lets_a_query_see_itself_and_what_is_before() -> None:
    device = torch.device("cpu")
    assert causal_mask(3, 3, 0, device).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert causal_mask(2, 4, 2, device).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
