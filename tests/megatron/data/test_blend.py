from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron.data.blend import BlendedSamples, blend, samples_of_each, split_documents
from megatron.data.samples import GPTSamples
from tests.megatron.data import reference
from tests.megatron.data.test_samples import make_dataset


def random_weights(seed: int, count: int) -> list[float]:
    """Weights of very different sizes, and for even seeds small whole numbers with many ties."""
    random = np.random.default_rng(seed)
    if seed % 2 == 0:
        return [float(weight) for weight in random.integers(1, 4, count)]
    return [float(weight) for weight in random.random(count) ** 4 + 1e-9]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("num_samples", [0, 1, 2, 99, 1500])
def test_blend_equals_the_plain_loop(seed: int, count: int, num_samples: int) -> None:
    weights = random_weights(seed, count)
    datasets, samples = blend(weights, num_samples)
    assert (datasets.tolist(), samples.tolist()) == reference.blend(weights, num_samples)


def test_more_than_255_datasets_equal_the_plain_loop() -> None:
    weights = random_weights(1, 300)
    datasets, samples = blend(weights, 2000)
    assert (datasets.tolist(), samples.tolist()) == reference.blend(weights, 2000)
    assert datasets.max() > 255


def test_longer_blend_begins_with_the_shorter_one() -> None:
    weights = random_weights(3, 5)
    for short, long in zip(blend(weights, 1000), blend(weights, 54321), strict=True):
        assert short.tolist() == long[:1000].tolist()


@pytest.mark.parametrize("seed", range(20))
def test_samples_of_each_dataset_are_enough(seed: int) -> None:
    weights = np.array(random_weights(seed, 6))
    weights /= weights.sum()
    for num_samples in (1, 2, 10, 777):
        datasets, samples = blend(weights.tolist(), num_samples)
        enough = samples_of_each(weights.tolist(), num_samples)
        for k in set(datasets.tolist()):
            assert samples[datasets == k].max() < enough[k]


def test_each_dataset_is_read_in_its_own_order(tmp_path: Path) -> None:
    datasets = [
        GPTSamples(make_dataset(tmp_path / name, [list(range(first, first + 100))]), 20, 4, 0)
        for name, first in (("a", 0), ("b", 1000))
    ]
    samples = BlendedSamples(datasets, [3, 1], 16)
    assert len(samples) == 16
    which, number = reference.blend([3, 1], 16)
    assert which.count(0) == 12
    for i in range(16):
        assert samples[i].tolist() == datasets[which[i]][number[i]].tolist()


def test_index_out_of_range_is_an_error(tmp_path: Path) -> None:
    dataset = GPTSamples(make_dataset(tmp_path / "a", [[1, 2, 3, 4, 5]]), 2, 2, 0)
    with pytest.raises(IndexError):
        BlendedSamples([dataset, dataset], [1, 1], 2)[2]


@pytest.mark.parametrize(
    ("num_documents", "shares", "bounds"),
    [
        (1000, (969, 30, 1), [0, 969, 999, 1000]),
        (100, (969, 30, 1), [0, 97, 100, 100]),
        (10, (1, 1, 1), [0, 4, 7, 10]),
        (11, (1, 1, 1), [0, 3, 7, 11]),
        (1, (1, 0, 0), [0, 1, 1, 1]),
        (2, (0.5, 0.25, 0.25), [0, 2, 2, 2]),
        (0, (969, 30, 1), [0, 0, 0, 0]),
    ],
)
def test_documents_are_split_in_shares(
    num_documents: int, shares: tuple[float, ...], bounds: list[int]
) -> None:
    expected = [range(start, stop) for start, stop in pairwise(bounds)]
    assert split_documents(num_documents, shares) == expected
