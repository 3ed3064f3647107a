import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron.data.samples import GPTSamples, SampleOrder
from megatron.errors import DataError
from tests.megatron.data import reference


def random_documents(seed: int, count: int, longest: int) -> list[list[int]]:
    """Documents of 0 to ``longest`` tokens, the first and the last of them empty."""
    random = np.random.default_rng(seed)
    lengths = [0, *random.integers(0, longest + 1, count - 2).tolist(), 0]
    return [random.integers(0, 60000, length).tolist() for length in lengths]


def make_dataset(prefix: Path, documents: list[list[int]], dtype: str = "int32") -> IndexedDataset:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.add(ids)
            writer.end_document()
    return IndexedDataset(prefix)


def as_lists(samples: GPTSamples) -> list[list[int]]:
    return [samples[i].tolist() for i in range(len(samples))]


@pytest.mark.parametrize("seed", [0, 1, 1234])
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize(("longest", "seq_length"), [(40, 16), (5, 16), (200, 8), (3, 1)])
@pytest.mark.parametrize("epochs", [0.5, 1.0, 1.5, 1.97, 3.2, 4.0])
def test_samples_equal_the_plain_definition(
    tmp_path: Path, seed: int, dtype: str, longest: int, seq_length: int, epochs: float
) -> None:
    documents = random_documents(seed, 30, longest)
    num_samples = int(epochs * sum(map(len, documents)) / seq_length)
    dataset = make_dataset(tmp_path / "a", documents, dtype)
    samples = GPTSamples(dataset, num_samples, seq_length, seed)
    assert len(samples) >= num_samples
    assert as_lists(samples) == reference.gpt_samples(documents, 0, num_samples, seq_length, seed)
    assert (samples[0].dtype, samples[0].shape) == (np.dtype(np.int64), (seq_length + 1,))


@pytest.mark.parametrize(
    ("num_samples", "epochs", "apart"),
    [(9, 1, 0), (10, 2, 10), (16, 2, 10), (17, 2, 0), (19, 2, 0), (20, 3, 10)],
)
def test_last_epoch_is_apart_when_less_than_a_share_of_it_is_needed(
    num_samples: int, epochs: int, apart: int
) -> None:
    # One epoch has (100 - 1) // 10 = 9 samples, and int(0.95 * 9) = 8.
    order = SampleOrder(documents=5, tokens=100, num_samples=num_samples, seq_length=10, seed=0)
    assert order.epochs == epochs == reference.count_epochs(100, num_samples, 10)
    assert (order.samples_apart > 0) == reference.is_last_epoch_apart(100, num_samples, 10)
    assert order.samples_apart == apart


@pytest.mark.parametrize("seed", range(5))
def test_index_arrays_equal_a_walk_over_the_documents(tmp_path: Path, seed: int) -> None:
    documents = random_documents(seed, 40, 9)
    sizes = np.array([len(ids) for ids in documents], np.int32)
    order = SampleOrder(len(documents), int(sizes.sum()), 50, 12, seed)
    arrays = order.build(range(len(documents)), sizes)
    shuffled = [int(sizes[number]) for number in arrays["document_index"]]
    expected = reference.sample_starts(shuffled, order.samples, 12)
    assert arrays["sample_index"].tolist() == expected
    assert {name: (spec.shape, spec.dtype) for name, spec in order.specs().items()} == {
        name: (array.shape, array.dtype) for name, array in arrays.items()
    }


def test_samples_of_a_document_range_equal_the_plain_definition(tmp_path: Path) -> None:
    documents = random_documents(3, 50, 30)
    dataset = make_dataset(tmp_path / "a", documents)
    samples = GPTSamples(dataset, 60, 8, 7, documents=range(20, 35))
    assert as_lists(samples) == reference.gpt_samples(documents[20:35], 20, 60, 8, 7)


def test_one_epoch_reads_every_token_once(tmp_path: Path) -> None:
    documents = [list(range(10 * i, 10 * i + 10)) for i in range(16)]
    dataset = make_dataset(tmp_path / "a", documents)
    samples = GPTSamples(dataset, 1, 3, 0)
    read = sorted(token for tokens in as_lists(samples) for token in tokens[:-1])
    assert len(read) == 159
    assert len(set(read)) == 159


def test_index_out_of_range_is_an_error(tmp_path: Path) -> None:
    samples = GPTSamples(make_dataset(tmp_path / "a", [[1, 2, 3]]), 1, 2, 0)
    assert samples[-1].tolist() == [1, 2, 3]
    with pytest.raises(IndexError):
        samples[1]


def test_too_few_tokens_for_a_sample_are_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "a", [[1, 2], [3, 4, 5]])
    with pytest.raises(DataError, match="2 documents from 0 to 2 have 5 tokens, but one sample ha"):
        GPTSamples(dataset, 1, 5, 0)


def cached(tmp_path: Path, **changes: int) -> GPTSamples:
    values = {"num_samples": 40, "seq_length": 8, "seed": 1, **changes}
    dataset = IndexedDataset(tmp_path / "a")
    return GPTSamples(dataset, cache_folder=tmp_path / "cache", **values)  # type: ignore[arg-type]


def cache_files(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}


def test_order_is_read_back_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path / "a", random_documents(1, 30, 20))
    first = as_lists(cached(tmp_path))
    assert len(cache_files(tmp_path)) == 3
    monkeypatch.delattr(SampleOrder, "build")
    assert as_lists(cached(tmp_path)) == first


def test_cache_depends_on_everything_that_the_order_depends_on(tmp_path: Path) -> None:
    documents = random_documents(1, 30, 20)
    dataset = make_dataset(tmp_path / "a", documents)
    cached(tmp_path)
    cached(tmp_path, num_samples=41)
    cached(tmp_path, seq_length=9)
    cached(tmp_path, seed=2)
    GPTSamples(dataset, 40, 8, 1, range(0, 29), tmp_path / "cache")
    GPTSamples(dataset, 40, 8, 1, range(1, 30), tmp_path / "cache")
    make_dataset(tmp_path / "a", [[1], *documents[1:]])
    cached(tmp_path)
    assert len(cache_files(tmp_path)) == 7 * 3


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_damaged_cache_is_replaced(tmp_path: Path, damage: bytes | None) -> None:
    make_dataset(tmp_path / "a", random_documents(1, 30, 20))
    first = as_lists(cached(tmp_path))
    before = cache_files(tmp_path)
    for name, content in before.items():
        (tmp_path / "cache" / name).write_bytes(content[:-1] if damage is None else damage)
        assert as_lists(cached(tmp_path)) == first
        assert cache_files(tmp_path) == before


def test_pickle_in_the_cache_is_not_loaded(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", random_documents(1, 30, 20))
    first = as_lists(cached(tmp_path))
    before = cache_files(tmp_path)
    for name in before:
        np.save(tmp_path / "cache" / name, np.array([Canary(tmp_path)]), allow_pickle=True)
    assert as_lists(cached(tmp_path)) == first
    assert not (tmp_path / "canary").exists()
    assert cache_files(tmp_path) == before


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.folder / "canary",))


def test_array_of_another_shape_in_the_cache_is_replaced(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", random_documents(1, 30, 20))
    first = as_lists(cached(tmp_path))
    before = cache_files(tmp_path)
    for name in before:
        np.save(tmp_path / "cache" / name, np.zeros(3, np.int32))
    assert as_lists(cached(tmp_path)) == first
    assert cache_files(tmp_path) == before


def test_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make_dataset(tmp_path / "a", random_documents(1, 30, 20))
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        samples = GPTSamples(dataset, 40, 8, 1, cache_folder=tmp_path / "file")
    assert as_lists(samples) == as_lists(GPTSamples(dataset, 40, 8, 1))
    assert [record.getMessage() for record in caplog.records] == [
        f"nothing is kept for the next start: {tmp_path / 'file'}: cannot be made: File exists"
    ]


def test_ranks_that_build_at_once_agree(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", random_documents(1, 300, 20))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: as_lists(cached(tmp_path)), range(16)))
    assert all(result == results[0] for result in results)
    assert len(cache_files(tmp_path)) == 3
