"""Times of single kernels and links, against sums done by hand."""

from dataclasses import replace

import pytest

from megatron.planning.cluster import CLUSTERS
from megatron.planning.kernels import product_seconds, stream_seconds

GPU = replace(CLUSTERS["a100"], peak_flops=100e12, kernel_efficiency=1.0, num_sms=100)
TILE = 2 * 256 * 128 * 4096 / 1e12
"""Seconds of one tile of 256 x 128 with an inner length of 4096, on one multiprocessor."""


def test_full_waves_run_at_the_peak() -> None:
    assert product_seconds(GPU, 2560, 1280, 4096) == pytest.approx(TILE)
    operations = 2 * 25600 * 12800 * 4096
    assert product_seconds(GPU, 25600, 12800, 4096) == pytest.approx(operations / 100e12)


def test_last_wave_costs_as_much_as_a_full_one() -> None:
    # 1010 tiles in 11 waves of 100.
    assert product_seconds(GPU, 2560, 128 * 101, 4096) == pytest.approx(11 * TILE)


def test_small_products_take_small_tiles() -> None:
    # 64 tiles of 64 x 64, at 0.6 of the rate, where there would be 8 of 256 x 128.
    want = 2 * 64 * 64 * 4096 / (0.6 * 1e12)
    assert product_seconds(GPU, 512, 512, 4096) == pytest.approx(want)


def test_batch_fills_waves_together() -> None:
    assert product_seconds(GPU, 256, 128, 4096, batch=100) == pytest.approx(TILE)


@pytest.mark.parametrize(("inner", "share"), [(4064, 0.95), (4080, 0.9), (4088, 0.8), (4092, 0.04)])
def test_lengths_of_uneven_bytes_are_slower(inner: int, share: float) -> None:
    even = product_seconds(GPU, 2560, 1280, 4096) * inner / 4096
    assert product_seconds(GPU, 2560, 1280, inner) == pytest.approx(even / share)


def test_flat_products_take_as_long_as_reading_them() -> None:
    numbers = 64 * 2**14 + 2**14 * 2**14 + 64 * 2**14
    assert product_seconds(GPU, 64, 2**14, 2**14) >= stream_seconds(GPU, 2 * numbers)
    assert stream_seconds(replace(GPU, memory_bandwidth=1e12, memory_efficiency=0.5), 1e9) == 2e-3


CLUSTER = replace(
    CLUSTERS["h100"],
    gpus=64,
    intra_bandwidth=400.0,
    inter_bandwidth=80.0,
    link_efficiency=0.5,
    network_efficiency=1.0,
)


@pytest.mark.parametrize(
    ("stride", "size", "bandwidth"),
    [
        (1, 8, 200),  # within a node
        (4, 2, 200),
        (8, 8, 10),  # each of a node's 8 GPUs in a ring of its own
        (4, 4, 20),  # two GPUs of a node in each ring, four rings
        (1, 16, 80),  # one ring through both nodes
        (32, 2, 10),
    ],
)
def test_rings_share_the_links_of_a_node(stride: int, size: int, bandwidth: float) -> None:
    assert CLUSTER.bandwidth(stride, size) == bandwidth
