"""Rotary positions against their definition as a product of complex numbers."""

import torch
from torch import Tensor

from megatron.model.rotary import RotaryTable

SIZE = 8


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Pairs (x_k, x_k+d/2) as complex numbers, times e^(i position base^(-2k/d))."""
    exponents = torch.arange(SIZE // 2, dtype=torch.float64) * (-2 / SIZE)
    frequencies = 10000**exponents
    angles = positions.double()[:, None, :, None] * frequencies
    pairs = torch.complex(x[..., : SIZE // 2], x[..., SIZE // 2 :])
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def test_rotation_is_a_product_of_complex_numbers() -> None:
    x = torch.randn(2, 3, 5, SIZE, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2000]])
    table = RotaryTable.of_positions(positions, SIZE, torch.float64)
    torch.testing.assert_close(table.rotate(x), rotated(x, positions), rtol=0, atol=1e-12)


def test_scores_depend_on_the_distance_alone() -> None:
    query, key = torch.randn(2, 1, 1, 5, SIZE, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4]])
    scores = []
    for shift in (0, 1234):
        table = RotaryTable.of_positions(positions + shift, SIZE, torch.float64)
        scores.append(table.rotate(query) @ table.rotate(key).transpose(-1, -2))
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-11)
    # It does depend on the distance.
    assert not torch.allclose(scores[0], query @ key.transpose(-1, -2), atol=1e-2)


def test_position_zero_is_not_rotated() -> None:
    x = torch.randn(1, 2, 1, SIZE)
    table = RotaryTable.of_positions(torch.zeros(1, 1, dtype=torch.long), SIZE, torch.float32)
    assert torch.equal(table.rotate(x), x)


def test_float32_table_is_precise_at_far_positions() -> None:
    positions = torch.tensor([[100_000]])
    exact = RotaryTable.of_positions(positions, SIZE, torch.float64)
    table = RotaryTable.of_positions(positions, SIZE, torch.float32)
    torch.testing.assert_close(table.cos.double(), exact.cos, rtol=0, atol=1e-7)
