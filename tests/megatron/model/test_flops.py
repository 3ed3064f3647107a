"""Counts of parameters and operations against the published models and against our own, run."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from megatron.config import DataConfig, ModelConfig
from megatron.model.flops import count_parameters, flops_per_token, peak_flops
from megatron.model.inputs import build_inputs
from megatron.model.language_model import BloomForPretraining
from megatron.model.placement import Placement
from mpu import ParallelDims, build_groups, shard_spec
from tests.distributed import run_ranks


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


def test_the_counts_are_those_of_the_model() -> None:
    for config, parameters, flops in run_ranks(1, measure_models)[0]:
        assert count_parameters(config) == parameters
        assert flops_per_token(config, "full") * config.seq_length == flops


def test_parameters_do_not_depend_on_the_layout() -> None:
    counts = run_ranks(2, count_cut_parameters)
    assert counts == [count_parameters(TINY)] * 2


def measure_models() -> list[tuple[ModelConfig, int, int]]:
    """Models with the numbers of their parameters and of the operations of one training step."""
    configs = [
        TINY,
        replace(TINY, activation="swiglu", ffn_hidden_size=20, embedding_layernorm=False),
        replace(TINY, tie_embeddings=False, position_embedding="learned", num_token_types=3),
        replace(TINY, pooler=True, position_embedding="rotary"),
    ]
    return [(config, *measure(config)) for config in configs]


def measure(config: ModelConfig) -> tuple[int, int]:
    model = build(config, tensor=1)
    # Batches of one sequence; torch counts the matrix products as they run.
    tokens = torch.arange(config.seq_length + 1).unsqueeze(0)
    inputs = build_inputs(tokens, torch.zeros(1), DataConfig(), None, torch.float32)
    # The head adds to its gradient in place, by an operation that torch does not know the cost of.
    costs = {torch.ops.aten.addmm_: in_place_product_flops}
    with FlopCounterMode(display=False, custom_mapping=costs) as counter:
        model(inputs).backward()
    return num_parameters(model), counter.get_total_flops()


def in_place_product_flops(
    total: torch.Size, a: torch.Size, b: torch.Size, out_shape: torch.Size
) -> int:
    return 2 * a[0] * a[1] * b[1]


def count_cut_parameters() -> int:
    return num_parameters(build(TINY, tensor=2))


def build(config: ModelConfig, tensor: int) -> BloomForPretraining:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    # No padding, and the backend that runs every product, of causally masked scores too.
    config = replace(config, vocab_padding_multiple=1)
    return BloomForPretraining(config, Placement(group=group), backend="explicit")


def num_parameters(model: nn.Module) -> int:
    return sum(math.prod(shard_spec(parameter).shape) for parameter in model.parameters())


def test_causal_attention_counts_half_of_the_scores() -> None:
    scores = 3 * TINY.num_layers * 4 * TINY.seq_length * TINY.hidden_size
    assert flops_per_token(TINY, "full") - flops_per_token(TINY, "causal") == scores / 2


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA H800", 989.5e12),
        ("NVIDIA H800 PCIe", 756.5e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B300 SXM6 AC", 2250e12),
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
    assert peak_flops(name, torch.float16) == peak


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("Tesla V100S-PCIE-32GB", 130e12),
    ],
)
def test_devices_without_bf16_have_a_peak_in_fp16(name: str, peak: float) -> None:
    assert peak_flops(name, torch.float16) == peak
    assert peak_flops(name, torch.bfloat16) is None


@pytest.mark.parametrize("name", ["cpu", "NVIDIA A1000", "Tesla T4", "NVIDIA H200 MIG 1g.18gb", ""])
def test_unknown_devices_have_no_peak(name: str) -> None:
    assert peak_flops(name, torch.bfloat16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_peak_is_that_of_16_bits_only(dtype: torch.dtype) -> None:
    assert peak_flops("NVIDIA H200", dtype) is None
