"""What flash-attn is called with, by a module that stands for it."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.model.alibi import alibi_slopes
from megatron.model.attention import AttentionBias, attention, runs_on
from tests.megatron.model.attending import (
    EXACT,
    document_numbers,
    inputs,
    plain_attention,
    with_gradients,
)

SIZE = 16


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Install a module that computes what flash-attn documents, and lists the options it got."""
    calls = []

    def flash_attn_func(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        bias = AttentionBias(slopes=options["alibi_slopes"])
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return plain_attention(query, key, value, bias).transpose(1, 2)

    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


@pytest.mark.parametrize("slopes", [None, alibi_slopes(12)[:6]])
def test_flash_gets_causal_attention_with_slopes(
    flash: list[dict[str, Any]], slopes: Tensor | None
) -> None:
    tensors, bias = inputs(6, 70, 70, SIZE), AttentionBias(slopes=slopes)
    got, want = (with_gradients(backend, tensors, bias) for backend in ("flash", None))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT)
    assert flash == [{"softmax_scale": 1 / 4, "causal": True, "alibi_slopes": slopes}]


@pytest.mark.parametrize(
    "bias",
    [
        AttentionBias(documents=document_numbers([3, 2])),
        AttentionBias(slopes=alibi_slopes(2), alibi_precision="bloom_bf16"),
    ],
)
def test_flash_refuses_documents_and_rounded_bias(bias: AttentionBias) -> None:
    query, key, value, _ = inputs(2, 5, 5, SIZE)
    with pytest.raises(ValueError, match="flash has no documents and no bloom_bf16"):
        attention(query, key, value, bias, backend="flash")


@pytest.mark.usefixtures("flash")
def test_flash_runs_on_gpus() -> None:
    assert runs_on("flash", torch.device("cuda"))
    assert not runs_on("flash", torch.device("cpu"))


def test_flash_runs_nowhere_without_its_package() -> None:
    assert not runs_on("flash", torch.device("cuda"))
