"""Counts of parameters and operations against the published models and torch's own counter."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from megatron.config import ModelConfig
from megatron.model.flops import count_parameters, flops_per_token, peak_flops


def bloom(num_layers: int, hidden_size: int, num_heads: int) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        vocab_size=250_880,
        seq_length=2048,
    )


BLOOM = {
    "560m": (bloom(24, 1024, 16), 559_214_592, 3.957e9),
    "1b1": (bloom(24, 1536, 16), 1_065_314_304, 7.295e9),
    "1b7": (bloom(24, 2048, 16), 1_722_408_960, 1.154e10),
    "3b": (bloom(30, 2560, 32), 3_002_557_440, 1.990e10),
    "7b1": (bloom(30, 4096, 32), 7_069_016_064, 4.542e10),
    "176b": (bloom(70, 14336, 112), 176_247_271_424, 1.082e12),
}

TINY = ModelConfig(num_layers=2, hidden_size=8, num_heads=2, vocab_size=11, seq_length=6)


@pytest.mark.parametrize("name", BLOOM)
def test_parameters_are_those_of_the_published_models(name: str) -> None:
    config, parameters, _ = BLOOM[name]
    assert count_parameters(config) == parameters


@pytest.mark.parametrize("name", BLOOM)
def test_flops_are_those_of_the_published_models(name: str) -> None:
    config, _, flops = BLOOM[name]
    assert flops_per_token(config, "full") == pytest.approx(flops, rel=3e-4)


@pytest.mark.parametrize(
    ("change", "added"),
    [
        ({"tie_embeddings": False}, 11 * 8),
        ({"embedding_layernorm": False}, -2 * 8),
        ({"position_embedding": "learned"}, 6 * 8),
        ({"position_embedding": "rotary"}, 0),
        ({"num_token_types": 3}, 3 * 8),
        ({"pooler": True}, 8 * 8 + 8),
        ({"activation": "swiglu"}, 2 * (8 * 32 + 32)),
        ({"ffn_hidden_size": 20}, -2 * 12 * (8 + 1 + 8)),
        ({"vocab_padding_multiple": 64}, 0),
    ],
)
def test_each_part_adds_its_parameters(change: dict[str, object], added: int) -> None:
    assert count_parameters(replace(TINY, **change)) == count_parameters(TINY) + added  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@pytest.mark.parametrize("ffn", [None, 20])
def test_flops_are_those_that_torch_counts(
    activation: Literal["gelu", "geglu"], ffn: int | None
) -> None:
    config = replace(TINY, activation=activation, ffn_hidden_size=ffn)
    assert flops_per_token(config, "full") * config.seq_length == counted_flops(config)


def counted_flops(config: ModelConfig) -> int:
    """Operations of one training step on one sequence, run and counted by torch."""
    hidden, ffn, seq = config.hidden_size, config.ffn_size, config.seq_length
    width = 2 * ffn if config.is_gated else ffn
    # The step from the embedding's output on: a leaf that, like a hidden state, has a gradient.
    x = torch.randn(1, seq, hidden, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        for _ in range(config.num_layers):
            qkv = nn.Linear(hidden, 3 * hidden)(x).view(seq, config.num_heads, 3, -1)
            query, key, value = qkv.permute(2, 1, 0, 3)
            context = (query @ key.mT).softmax(-1) @ value
            x = nn.Linear(hidden, hidden)(context.transpose(0, 1).reshape(1, seq, hidden))
            inner = nn.Linear(hidden, width)(x)
            x = nn.Linear(ffn, hidden)(F.glu(inner) if config.is_gated else F.gelu(inner))
        nn.Linear(hidden, config.vocab_size, bias=False)(x).sum().backward()
    return counter.get_total_flops()


def test_causal_attention_counts_half_of_the_scores() -> None:
    scores = 3 * TINY.num_layers * 4 * TINY.seq_length * TINY.hidden_size
    assert flops_per_token(TINY, "full") - flops_per_token(TINY, "causal") == scores / 2


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA GH200 480GB", 989.5e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
    ],
)
def test_known_devices_have_a_peak(name: str, peak: float) -> None:
    assert peak_flops(name, torch.bfloat16) == peak


@pytest.mark.parametrize("name", ["cpu", "NVIDIA A1000", "Tesla T4", "NVIDIA H200 MIG 1g.18gb", ""])
def test_unknown_devices_have_no_peak(name: str) -> None:
    assert peak_flops(name, torch.bfloat16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_peak_is_that_of_bf16_only(dtype: torch.dtype) -> None:
    assert peak_flops("NVIDIA H200", dtype) is None
