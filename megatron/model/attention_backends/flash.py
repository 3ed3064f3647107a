"""Attention by the flash-attn package, where it is installed. GPU and 16-bit numbers only."""

import math
from importlib.util import find_spec

from torch import Tensor


def flash_is_installed() -> bool:
    """Whether flash-attn can be imported."""
    return find_spec("flash_attn") is not None


def flash_attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None) -> Tensor:
    """Attend causally, ``(batch, heads, seq, head_size)``, with ALiBi by float32 ``slopes``."""
    from flash_attn import flash_attn_func

    # The package has the sequence before the heads.
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scale = 1 / math.sqrt(query.size(-1))
    out: Tensor = flash_attn_func(
        query, key, value, softmax_scale=scale, causal=True, alibi_slopes=slopes
    )
    return out.transpose(1, 2)
