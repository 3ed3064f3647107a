"""What the fused softmax must compute, in float64, and how far from it rounding may lead.

With u the rounding of the dtype and f that of float32, a probability p may be off by

    e = (u + f (8 + 4 |largest logit|)) p + the smallest numbers

and the gradient scale p (dp - sum(p dp)) by what these errors make of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

SCALE = 0.37

Softmax: TypeAlias = Callable[[Tensor, float, Tensor | None, Tensor | None, int], Tensor]
Mask: TypeAlias = Literal["causal", "shared", "samples", "padding"]
MASKS: tuple[Mask, ...] = ("causal", "shared", "samples", "padding")


@dataclass(frozen=True)
class Shape:
    """Sizes of the scores, and the position of the first query."""

    batch: int
    heads: int
    queries: int
    keys: int
    query_start: int = 0


@dataclass(frozen=True)
class Case:
    """One call of the softmax and the gradient that comes back to it."""

    scores: Tensor
    grad: Tensor
    visible: Tensor | None
    slopes: Tensor | None
    query_start: int


def cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every kind of mask, with and without ALiBi."""
    size = (shape.batch, shape.heads, shape.queries, shape.keys)
    slopes = 2.0 ** -torch.arange(1, shape.heads + 1, device=device)
    for mask in MASKS:
        for bias in (None, slopes):
            scores = (4 * torch.randn(size, device=device)).to(dtype)
            grad = torch.randn(size, device=device).to(dtype)
            yield Case(scores, grad, make_mask(mask, shape, device), bias, shape.query_start)


def make_mask(mask: Mask, shape: Shape, device: torch.device) -> Tensor | None:
    """A mask with rows that see nothing; None for ``causal``, a broadcast view for ``padding``."""
    if mask == "causal":
        return None
    batch = 1 if mask == "shared" else shape.batch
    if mask == "padding":
        seen = torch.rand(batch, 1, 1, shape.keys, device=device) < 0.7
        return seen.expand(batch, 1, shape.queries, shape.keys)
    seen = torch.rand(batch, 1, shape.queries, shape.keys, device=device) < 0.5
    seen[:, :, shape.queries // 2] = False
    return seen


def worst_errors(softmax: Softmax, case: Case, *, truncates: bool = False) -> tuple[float, float]:
    """The largest error of a probability and of a gradient, each in units of what it may be.

    Asserts that what is not visible gets exactly 0. ``truncates`` allows for results that are
    cut off instead of rounded.
    """
    unit = _unit(case.scores.dtype) * (2 if truncates else 1)
    scores = case.scores.clone().requires_grad_()
    p = softmax(scores, SCALE, case.visible, case.slopes, case.query_start)
    (dscores,) = torch.autograd.grad(p, scores, case.grad)
    assert p.dtype == dscores.dtype == case.scores.dtype
    logits, visible = _logits(case)
    hidden = (~visible).expand_as(p)
    assert not dscores[hidden].any()
    assert not p[hidden & visible.any(-1, keepdim=True)].any()
    want, want_error = _probabilities(logits, visible, unit, case.scores.dtype)
    dwant, dwant_error = _gradient(want, want_error, visible, unit, case)
    return (
        ((p - want).abs() / want_error).max().item(),
        ((dscores - dwant).abs() / dwant_error).max().item(),
    )


def _logits(case: Case) -> tuple[Tensor, Tensor]:
    """Scores with scale and bias, in float64, and the mask."""
    num_queries, num_keys = case.scores.shape[-2:]
    device = case.scores.device
    queries = torch.arange(num_queries, device=device).unsqueeze(-1) + case.query_start
    distance = queries - torch.arange(num_keys, device=device)
    logits = SCALE * case.scores.double()
    if case.slopes is not None:
        logits -= case.slopes.double().view(-1, 1, 1) * distance
    return logits, distance >= 0 if case.visible is None else case.visible


def _probabilities(
    logits: Tensor, visible: Tensor, unit: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The softmax over the visible keys, of all keys alike where there is none, and its error."""
    seen = logits.masked_fill(~visible, -torch.inf)
    p = torch.softmax(seen, dim=-1).nan_to_num(nan=1 / logits.size(-1))
    largest = seen.abs().masked_fill(~visible, 0).amax(-1, keepdim=True)
    return p, p * (unit + _unit(torch.float32) * (8 + 4 * largest)) + _smallest(dtype)


def _gradient(
    p: Tensor, error: Tensor, visible: Tensor, unit: float, case: Case
) -> tuple[Tensor, Tensor]:
    """Gradient of the scores for probabilities that are off by ``error``, and its own error."""
    p, error = p * visible, error * visible
    dp = case.grad.double()
    inner = (p * dp).sum(-1, keepdim=True)
    want = SCALE * p * (dp - inner)
    passed_on = error * (dp - inner).abs() + p * (error * dp.abs()).sum(-1, keepdim=True)
    sums = 8 * _unit(torch.float32) * p * (dp.abs() + (p * dp).abs().sum(-1, keepdim=True))
    first_order = SCALE * (passed_on + sums) + unit * want.abs() + _smallest(case.grad.dtype)
    return want, 1.01 * first_order


def _unit(dtype: torch.dtype) -> float:
    """Relative error of rounding to ``dtype``."""
    return torch.finfo(dtype).eps / 2


def _smallest(dtype: torch.dtype) -> float:
    """Error of rounding among subnormal numbers; those of float32 may become 0."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps / 2 + torch.finfo(torch.float32).tiny
