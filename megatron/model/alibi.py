"""ALiBi: attention with linear biases (Press, Smith and Lewis 2022, arXiv:2108.12409).

The score of query i and key j gets the bias -m (i - j), with a slope m of its own for each head.
Because a softmax does not change when a row is shifted, m j is the same bias.
"""

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """The slope of each head, float32 ``(num_heads,)``.

    For n = 2^k heads they are the geometric sequence 2^(-8 (i + 1) / n). Other numbers of heads
    take the slopes of the next smaller power of two, and then every other one of its double.
    """
    closest = 2 ** math.floor(math.log2(num_heads))
    between = _geometric_slopes(2 * closest)[::2]
    slopes = _geometric_slopes(closest) + between[: num_heads - closest]
    return torch.tensor(slopes, dtype=torch.float32)


def _geometric_slopes(num_heads: int) -> list[float]:
    return [2.0 ** (-8 * (i + 1) / num_heads) for i in range(num_heads)]


def bloom_bf16_bias(slopes: Tensor, num_keys: int) -> Tensor:
    """The bias m j rounded to bfloat16, ``(heads, num_keys)``, as the published BLOOMs had it.

    With the 8 significant bits of bfloat16, the bias of far keys moves in steps of up to 2^-8 of
    its size. A model that was trained with it has learned around them.
    """
    positions = torch.arange(num_keys, dtype=torch.float32, device=slopes.device)
    return (slopes.unsqueeze(-1) * positions).bfloat16()
