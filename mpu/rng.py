"""Random numbers named by what they belong to, so that no layout of a run changes them.

A generator that is drawn from in order gives other numbers whenever the order changes: with another
tensor size, micro-batch, or point of resumption. Here a number is a hash of its name instead. The
name of a dropout bit is (seed, sample, layer, site, head, position, column); that of an initial
weight is (seed, parameter, row, column). Whoever needs a number computes it, on any rank, in any
order, again in recomputation or after a resumption, and holds no state for it.

    row key  = splitmix64 of the parts of the name, folded in one after the other
    number   = lowbias32 (column * odd half of the key + other half)

The two finalizers are those of Steele, Lea and Flood, "Fast splittable pseudorandom number
generators" (OOPSLA 2014), whose per-stream odd increments this follows, and of C. Wellons' search
for 32-bit integer hashes of low bias (2018).
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpu.sharding import Box, shard_spec

# The constants of splitmix64, as torch's signed integers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)

_INIT_ELEMENTS = 2**22
"""Weights that are drawn at once: bounds the memory that initialisation needs besides them."""


@dataclass(frozen=True)
class RngStreams:
    """The random numbers of one microbatch.

    Attributes:
        seed: seed of the run.
        samples: number of each sample of the microbatch in the run, int64 ``(batch,)``.
    """

    seed: int
    samples: Tensor

    def keys(self, *path: int, axes: Iterable[range] = ()) -> Tensor:
        """Keys of the stream called ``path``: ``(batch, len(axis), ...)``, one for each row.

        ``axes`` are the indices, in the whole tensor, of the rows that this rank holds: its heads
        or its part of the sequence.
        """
        keys = _fold(torch.full_like(self.samples, self.seed), self.samples)
        for part in path:
            keys = _fold(keys, torch.full_like(keys, part))
        for axis in axes:
            indices = torch.arange(axis.start, axis.stop, device=keys.device)
            keys = _fold(keys.unsqueeze(-1), indices)
        return keys


def dropout(x: Tensor, p: float, keys: Tensor) -> Tensor:
    """Zero each element of ``x`` with probability ``p`` and scale the others by ``1 / (1 - p)``.

    Args:
        x: ``(*, n)``.
        p: probability, at least 0 and below 1.
        keys: key of each row of ``x``, ``(*)``.
    """
    return _Dropout.apply(x, p, keys)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, keys: Tensor) -> Tensor:
        threshold = int(p * 2**32) - 2**31
        keep = _random_bits(keys, x.size(-1)) >= threshold
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - p)
        return x * keep * ctx.scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return grad * keep * ctx.scale, None, None


@torch.no_grad()
def init_normal(
    parameter: nn.Parameter, *, seed: int, name: str, std: float, rank: int, size: int
) -> None:
    """Fill ``parameter`` with this rank's part of a normal matrix; padding becomes zero.

    The whole matrix is a function of ``seed`` and ``name`` alone, and no rank holds it. On the meta
    device there is nothing to fill.

    Args:
        rank: of the tensor group.
        size: of the tensor group.
    """
    if parameter.is_meta:
        return
    parameter.zero_()
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little", signed=True)
    for box in shard_spec(parameter).boxes(parameter, rank, size):
        _fill(box, key, std)


def _fill(box: Box, key: int, std: float) -> None:
    """Fill ``box`` of a one- or two-dimensional whole tensor."""
    out = box.tensor
    rows = out.unsqueeze(0) if out.dim() == 1 else out
    first_row = box.start[0] if out.dim() == 2 else 0
    first_column, num_columns = box.start[-1], out.size(-1)
    step = max(1, _INIT_ELEMENTS // num_columns)
    for start in range(0, rows.size(0), step):
        part = rows[start : start + step]
        indices = torch.arange(start, start + part.size(0), device=out.device) + first_row
        row_keys = _fold(torch.full_like(indices, key), indices)
        part.copy_(_standard_normal(row_keys, num_columns, first_column) * std)


def _standard_normal(keys: Tensor, num_columns: int, first_column: int) -> Tensor:
    """Box and Muller's transform of two uniform numbers for each element."""
    radius = _uniform(_fold(keys, torch.zeros_like(keys)), num_columns, first_column)
    angle = _uniform(_fold(keys, torch.ones_like(keys)), num_columns, first_column)
    radius.log_().mul_(-2).sqrt_()
    return radius.mul_(angle.mul_(2 * math.pi).cos_())


def _uniform(keys: Tensor, num_columns: int, first_column: int) -> Tensor:
    """Uniform numbers of (0, 1), never the ends, in double precision."""
    bits = _random_bits(keys, num_columns, first_column)
    return bits.double().add_(2**31 + 0.5).mul_(2.0**-32)


def _fold(keys: Tensor, values: Tensor) -> Tensor:
    """New int64 keys from ``keys`` and ``values``, which broadcast: splitmix64 of their sum."""
    if keys.is_meta:
        return keys + values
    x = keys + (values + 1) * _INCREMENT
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ _shift_right(x, shift, 64)) * multiplier
    return x ^ _shift_right(x, 31, 64)


def _random_bits(keys: Tensor, num_columns: int, first_column: int = 0) -> Tensor:
    """32 random bits for each column of each row: int64 ``(*)`` -> int32 ``(*, num_columns)``."""
    if keys.is_meta:
        # Nothing to compute; a step of it has the bits before and after.
        bits = torch.empty((*keys.shape, num_columns), dtype=torch.int32, device=keys.device)
        return bits.clone()
    columns = torch.arange(
        first_column, first_column + num_columns, dtype=torch.int32, device=keys.device
    )
    stride = keys.to(torch.int32) | 1
    offset = _shift_right(keys, 32, 64).to(torch.int32)
    x = columns * stride.unsqueeze(-1)
    x += offset.unsqueeze(-1)
    x ^= _shift_right(x, 16, 32)
    x *= 0x7FEB352D
    x ^= _shift_right(x, 15, 32)
    x *= 0x846CA68B - 2**32
    x ^= _shift_right(x, 16, 32)
    return x


def _shift_right(x: Tensor, shift: int, width: int) -> Tensor:
    """Shift ``width``-bit integers right, filling with zeros; torch fills with the sign."""
    return (x >> shift).bitwise_and_((1 << (width - shift)) - 1)
