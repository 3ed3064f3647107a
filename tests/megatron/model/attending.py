"""Attention by its definition, and what the tests of attention share."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.model.alibi import bloom_bf16_bias
from megatron.model.attention import AttentionBias, Backend, attention

EXACT = 1e-12
"""Greatest difference between two computations in float64."""


def inputs(
    heads: int, queries: int, keys: int, size: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Query, key, value and gradient of the output, for a batch of two."""
    lengths = (queries, keys, keys, queries)
    tensors = [torch.randn(2, heads, n, size, dtype=torch.float64).to(dtype) for n in lengths]
    return [tensor.requires_grad_() for tensor in tensors[:3]] + tensors[3:]


def document_numbers(lengths: Sequence[int]) -> Tensor:
    """Numbers of two samples of documents, the second in reverse order."""
    orders = (lengths, lengths[::-1])
    return torch.stack(
        [torch.arange(len(order)).repeat_interleave(torch.tensor(order)) for order in orders]
    )


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
    visible = j <= i
    if bias.documents is not None:
        documents = bias.documents
        same = documents.unsqueeze(2) == documents.unsqueeze(1)
        visible = (visible & same).unsqueeze(1)
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


def errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    """Root mean square errors relative to the size of what is wanted."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]
