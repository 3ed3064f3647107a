"""Seconds of single kernels on a GPU: a product is computed in tiles, all else is memory traffic.

A product is cut into tiles of its result, which the multiprocessors take in waves. The last wave
costs as much as a full one, and so does a tile that is not full:

    5 tiles on 4 multiprocessors    [1 2 3 4] [5 . . .]     two waves

Libraries have kernels of several tile sizes and take the fastest for a shape, which is done here
too. Smaller tiles fill the multiprocessors better, but read each operand more often. Tensor cores
read their operands in runs of 128 bytes; of lengths that do not divide into these, they lose some,
and below 16 bytes most (NVIDIA, "Matrix Multiplication Background User's Guide").
"""

from megatron.planning.cluster import Cluster

_TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.9), (128, 64, 0.75), (64, 64, 0.6))
"""Rows and columns of a tile, and the share of a GPU's rate that tiles of this size reach."""

_ALIGNED = {64: 1.0, 32: 0.95, 16: 0.9, 8: 0.8}
"""Share of the rate that is left, by the largest power of two that all lengths are multiples of."""

_UNALIGNED = 0.04
"""The same below 16 bytes: 11 of an A100's 312 TFLOP/s, as in BLOOM's runs with heads of 108."""

_ITEMSIZE = 2
"""Bytes of a number in 16-bit precision."""


def product_seconds(
    cluster: Cluster, rows: int, columns: int, inner: int, *, batch: int = 1
) -> float:
    """Of ``batch`` products of 16-bit ``(rows, inner)`` and ``(inner, columns)``."""
    rate = cluster.peak_flops * cluster.kernel_efficiency * _alignment(rows, columns, inner)
    computing = min(
        _waves(cluster, rows, columns, batch, tile_rows, tile_columns)
        * (2 * tile_rows * tile_columns * inner)
        / (share * rate / cluster.num_sms)
        for tile_rows, tile_columns, share in _TILES
    )
    numbers = batch * (rows * inner + inner * columns + rows * columns)
    return max(computing, stream_seconds(cluster, _ITEMSIZE * numbers))


def stream_seconds(cluster: Cluster, num_bytes: float) -> float:
    """Of kernels that read and write as many bytes in all."""
    return num_bytes / (cluster.memory_bandwidth * cluster.memory_efficiency)


def _waves(
    cluster: Cluster, rows: int, columns: int, batch: int, tile_rows: int, tile_columns: int
) -> int:
    tiles = batch * -(-rows // tile_rows) * -(-columns // tile_columns)
    return -(-tiles // cluster.num_sms)


def _alignment(*lengths: int) -> float:
    return min(_ALIGNED.get(min(64, length & -length), _UNALIGNED) for length in lengths)
