"""Loss curves: what the small model reads, and what a point is."""

import torch

from megatron.benchmarks.curves import Size, microbatch, read_samples
from megatron.benchmarks.fp8_loss import QUICK


def test_points_are_means_of_equal_intervals() -> None:
    size = Size(QUICK.model, batch=2, steps=5, interval=2)
    assert size.points == [2, 4, 5]
    assert size.means([1, 3, 5, 7, 9]) == [2, 6, 9]


def test_each_byte_predicts_the_next() -> None:
    samples = read_samples(16)
    batch = microbatch(samples, range(3, 5))
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert torch.equal(batch.targets[:, -1], samples[3:5, -1])
    assert batch.samples.tolist() == [3, 4]
