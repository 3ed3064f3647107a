"""What blocked attention computes and keeps."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron.model.alibi import alibi_slopes
from megatron.model.attention import AttentionBias, Backend, attention
from tests.figures import Figure
from tests.megatron.model.attending import inputs

BIAS = AttentionBias(slopes=alibi_slopes(4))


def in_place(
    total: torch.Size, a: torch.Size, b: torch.Size, *, out_shape: torch.Size, **_: object
) -> int:
    """Of a product that is added to ``total``; the counter of torch does not know it."""
    return 2 * a.numel() * b[-1]


def product_flops(backend: Backend, length: int) -> int:
    """Of all matrix products, forward and backward."""
    query, key, value, grad = inputs(4, length, length, 8)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place})
    with counter:
        out = attention(query, key, value, BIAS, backend=backend)
        torch.autograd.grad(out, (query, key, value), grad)
    return counter.get_total_flops()


def kept_bytes(backend: Backend, length: int, *, training: bool = True) -> int:
    """Of all tensors that the backward pass of attention will read."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    query, key, value, _ = (
        x.detach().requires_grad_(training) for x in inputs(4, length, length, 8)
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(query, key, value, BIAS, backend=backend)
    return sum(kept.values())


def test_hidden_blocks_are_not_computed() -> None:
    # Of 4 x 4 blocks, 10 are not all hidden.
    assert product_flops("blocked", 512) == product_flops("explicit", 512) * 10 / 16


def test_less_is_kept_than_by_the_definition(figure: Figure) -> None:
    share = kept_bytes("blocked", 512) / kept_bytes("explicit", 512)
    figure("memory of blocked attention of 4 blocks", part=share)
    # 10 of 16 blocks of probabilities, and queries, keys and values as before.
    assert share < 2 / 3


def test_nothing_is_kept_without_gradients() -> None:
    assert kept_bytes("blocked", 256, training=False) == 0


def test_gradients_of_gradients_are_refused() -> None:
    query, key, value, _ = inputs(4, 5, 5, 8)
    out = attention(query, key, value, BIAS, backend="blocked")
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
