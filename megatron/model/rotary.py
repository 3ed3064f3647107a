"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), which rotates pairs of halves."""

from dataclasses import dataclass

import torch
from torch import Tensor

_BASE = 10000.0


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of the rotation angles, each ``(batch or 1, 1, seq, head_size / 2)``."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of_positions(cls, positions: Tensor, head_size: int, dtype: torch.dtype) -> "RotaryTable":
        """The table of ``positions``, ``(batch or 1, seq)``.

        Angles are computed in double precision: float32 is off by 1e-4 at position 2000.
        """
        exponents = torch.arange(0, head_size, 2, dtype=torch.float64, device=positions.device)
        angles = positions.unsqueeze(-1) * _BASE ** (-exponents / head_size)
        angles = angles.unsqueeze(1)
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate queries or keys, ``(batch, heads, seq, head_size)``."""
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            [first * self.cos - second * self.sin, second * self.cos + first * self.sin], dim=-1
        )
