"""ALiBi's slopes, against published values, and BLOOM's rounded bias."""

import pytest
import torch

from megatron.model.alibi import alibi_slopes, bloom_bf16_bias

# By number of heads, the binary logarithms of the slopes. 112 heads are those of BLOOM-176B.
LOG_SLOPES = {
    8: [-1.0 * n for n in range(1, 9)],
    12: [-1.0 * n for n in range(1, 9)] + [-0.5, -1.5, -2.5, -3.5],
    16: [-0.5 * n for n in range(1, 17)],
    32: [-0.25 * n for n in range(1, 33)],
    112: [-0.125 * n for n in range(1, 65)] + [-0.0625 * n for n in range(1, 97, 2)],
}


@pytest.mark.parametrize("num_heads", LOG_SLOPES)
def test_slopes_are_the_published_ones(num_heads: int) -> None:
    slopes = alibi_slopes(num_heads)
    want = torch.tensor([2.0**exponent for exponent in LOG_SLOPES[num_heads]])
    assert slopes.dtype == torch.float32
    assert torch.equal(slopes, want)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 7])
def test_few_heads_have_distinct_slopes_below_one(num_heads: int) -> None:
    slopes = alibi_slopes(num_heads).tolist()
    assert len(set(slopes)) == num_heads
    assert all(0 < slope < 1 for slope in slopes)


def test_rounded_bias_is_the_product_rounded_once() -> None:
    slopes = alibi_slopes(12)
    bias = bloom_bf16_bias(slopes, 3000)
    assert bias.dtype == torch.bfloat16
    exact = slopes.double().unsqueeze(-1) * torch.arange(3000)
    # Half of the last of the eight bits that bfloat16 has, and float32's rounding before it.
    assert ((bias.double() - exact).abs() <= exact * (2**-8 + 2**-20)).all()
    assert torch.equal(bias[:, 1], slopes.bfloat16())
