"""Parameters and floating-point operations of a model, counted from its shape.

Counted are the matrix products that the model needs, a multiply and an add as two operations. With
hidden size h, MLP width f, sequence length s, vocabulary V and L layers, the forward pass of one
token takes

    attention weights      2 * 4 h^2         query, key, value and output
    attention scores       4 s h             with keys and with values; half of it if causal
    MLP                    2 * 2 h f         2 * 3 h f if gated
    head                   2 h V             once; the others once a layer

and the backward pass twice as much. Not counted are what recomputation repeats, padding, and
everything that is no matrix product of every token. For BLOOM with full attention this is
72 L h^2 (1 + s / 6h + V / 12 L h).

Published utilisations follow both conventions of attention, so a figure has to name its own.
"""

import re
from typing import Literal

import torch

from megatron.config import ModelConfig

# Dense FLOP/s of tensor cores by NVIDIA's data sheets of each product, half of what they give with
# sparsity. By the name that CUDA reports; the first match counts. A800 and H800 are A100 and H100
# with slower links. Of GB200 and GB300 it is that of one GPU, 1/72 of an NVL72.
_PEAK_BF16 = (
    (r"A[18]00", 312e12),
    (r"H[18]00 PCIe", 756.5e12),
    (r"H(100|200) NVL", 835.5e12),
    (r"(H[18]00|H200|GH200)", 989.5e12),
    (r"B[23]00", 2250e12),
    (r"GB[23]00", 2500e12),
    (r"L40S", 362e12),
)

# As much in fp16, and there alone on devices that do not multiply bf16.
_PEAK_FP16 = (
    *_PEAK_BF16,
    (r"V100-PCIE", 112e12),
    (r"V100S", 130e12),
    (r"V100", 125e12),
)

_PEAKS = {torch.bfloat16: _PEAK_BF16, torch.float16: _PEAK_FP16}


def count_parameters(config: ModelConfig) -> int:
    """Number of logical parameters: tied weights once, padding not at all."""
    hidden = config.hidden_size
    head = 0 if config.tie_embeddings else config.vocab_size * hidden
    return _embedding(config) + config.num_layers * _layer(config) + 2 * hidden + head


def flops_per_token(config: ModelConfig, attention: Literal["causal", "full"]) -> float:
    """Floating-point operations to train on one token, forward and backward.

    Args:
        attention: whether the scores above the diagonal count, which a causal model masks.
    """
    return 3 * (config.num_layers * layer_flops(config, attention) + head_flops(config))


def layer_flops(config: ModelConfig, attention: Literal["causal", "full"] = "causal") -> float:
    """Floating-point operations of one layer for one token, forward."""
    hidden, ffn = config.hidden_size, config.ffn_size
    weights = 4 * hidden**2 + (_mlp_inputs(config) + 1) * hidden * ffn
    keys = config.seq_length if attention == "full" else config.seq_length / 2
    return 2 * weights + 4 * keys * hidden


def head_flops(config: ModelConfig) -> float:
    """Floating-point operations of the head for one token, forward."""
    return 2 * config.hidden_size * config.vocab_size


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s that the data sheet of a device promises, or None where we do not know it.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
    """
    # A slice of a device has the name of the whole.
    if "MIG" in device_name:
        return None
    for pattern, peak in _PEAKS.get(dtype, ()):
        if re.search(rf"\b{pattern}\b", device_name):
            return peak
    return None


def _embedding(config: ModelConfig) -> int:
    positions = config.seq_length if config.position_embedding == "learned" else 0
    rows = config.vocab_size + positions + config.num_token_types
    layernorm = 2 if config.embedding_layernorm else 0
    pooler = config.hidden_size + 1 if config.pooler else 0
    return (rows + layernorm + pooler) * config.hidden_size


def _layer(config: ModelConfig) -> int:
    hidden = config.hidden_size
    layernorms = 2 * 2 * hidden
    attention = 4 * (hidden + 1) * hidden
    width = _mlp_inputs(config) * config.ffn_size
    mlp = (hidden + 1) * width + (config.ffn_size + 1) * hidden
    return layernorms + attention + mlp


def _mlp_inputs(config: ModelConfig) -> int:
    """Matrices that read the input of the MLP: a gated unit has two."""
    return 2 if config.is_gated else 1
