import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.config import Config, DataConfig, ModelConfig, TrainConfig
from megatron.data.blend import split_documents
from megatron.data.description import Description, write_description
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.loader import SPLITS, MicrobatchLoader, Split, build_samples
from megatron.errors import DataError
from megatron.tokenizer import load_tokenizer
from tests.megatron.data import reference
from tests.megatron.data.test_samples import make_dataset, random_documents
from tests.megatron.test_tokenizer import make_tokenizer_file

SEQ_LENGTH = 8
SEED = 5


def make_config(folder: Path, *prefixes: Path, vocab_size: int = 60000, **data: Any) -> Config:
    """A config that reads ``prefixes``, each with twice the weight of the one before."""
    return Config(
        folder=folder / "run",
        model=ModelConfig(
            num_layers=1,
            hidden_size=8,
            num_heads=2,
            vocab_size=vocab_size,
            seq_length=SEQ_LENGTH,
        ),
        train=TrainConfig(samples=64, global_batch_size=4, seed=SEED),
        data=DataConfig(paths={str(p): 2.0**i for i, p in enumerate(prefixes)}, **data),
    )


def describe(prefix: Path, **changes: Any) -> None:
    values = {
        "dataset": IndexedDataset(prefix).fingerprint,
        "tokenizer": "0" * 32,
        "vocab_size": 60000,
        "largest_token": 59999,
        "documents": 1,
        "tokens": 1,
        "utf8_bytes": 1,
    }
    write_description(prefix, Description(**{**values, **changes}))


@pytest.mark.parametrize("split", SPLITS)
def test_one_path_gives_the_samples_of_the_split(tmp_path: Path, split: Split) -> None:
    documents = random_documents(1, 60, 30)
    make_dataset(tmp_path / "a", documents)
    config = make_config(tmp_path, tmp_path / "a", split=(8, 1, 1))
    chosen = split_documents(60, (8, 1, 1))[SPLITS.index(split)]
    expected = reference.gpt_samples(
        documents[chosen.start : chosen.stop], chosen.start, 20, SEQ_LENGTH, SEED
    )
    samples = build_samples(config, split, 20)
    assert [samples[i].tolist() for i in range(len(samples))] == expected


def test_several_paths_are_blended(tmp_path: Path) -> None:
    prefixes = [tmp_path / name for name in "abc"]
    documents = [random_documents(seed, 40, 30) for seed in range(3)]
    for prefix, content in zip(prefixes, documents, strict=True):
        make_dataset(prefix, content)
    config = make_config(tmp_path, *prefixes, split=(1, 0, 0))
    samples = build_samples(config, "train", 70)
    # The shares are 1/7, 2/7 and 4/7 of 70 samples, and half a percent more.
    orders = [
        reference.gpt_samples(content, 0, needed, SEQ_LENGTH, SEED)
        for content, needed in zip(documents, (11, 21, 41), strict=True)
    ]
    which, number = reference.blend([1, 2, 4], 70)
    assert len(samples) == 70
    for i in range(70):
        assert samples[i].tolist() == orders[which[i]][number[i]]


def test_orders_are_kept_beside_the_data_or_where_asked(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", random_documents(1, 60, 30))
    build_samples(make_config(tmp_path, tmp_path / "a"), "train", 20)
    assert len(list(tmp_path.glob("a-*.npy"))) == 3
    cache = tmp_path / "cache"
    build_samples(make_config(tmp_path, tmp_path / "a", cache_folder=cache), "train", 20)
    assert len(list(tmp_path.glob("a-*.npy"))) == 3
    assert len(list(cache.glob("a-*.npy"))) == 3


def refusal(config: Config, split: Split = "train") -> str:
    with pytest.raises(DataError) as caught:
        build_samples(config, split, 20)
    message = str(caught.value)
    assert message.count("\n") <= 1
    return message


def test_missing_data_is_refused(tmp_path: Path) -> None:
    assert "data.paths is empty" in refusal(make_config(tmp_path))
    assert f"{tmp_path / 'a.idx'}: cannot be read: No such file" in refusal(
        make_config(tmp_path, tmp_path / "a")
    )


def test_split_without_documents_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", random_documents(1, 10, 30))
    assert refusal(make_config(tmp_path, tmp_path / "a"), "valid") == (
        f"{tmp_path / 'a'}: data.split [969, 30, 1] leaves none of its 10 documents for valid"
    )


def test_split_without_enough_tokens_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [[1] * 50, [2] * SEQ_LENGTH])
    config = make_config(tmp_path, tmp_path / "a", split=(1, 1, 0))
    assert "documents from 1 to 2 have 8 tokens, but one sample has 9" in refusal(config, "valid")


@pytest.mark.parametrize(("token", "dtype"), [(100, "int32"), (100, "uint16"), (-1, "int32")])
def test_token_outside_the_vocabulary_is_refused(tmp_path: Path, token: int, dtype: str) -> None:
    make_dataset(tmp_path / "a", [[1] * 50, [99, token]], dtype)
    config = make_config(tmp_path, tmp_path / "a", vocab_size=100)
    expected = (
        f"{tmp_path / 'a.bin'}: has the token id {token} at byte {51 * np.dtype(dtype).itemsize} "
        "(document 1, token 1 of it, counted from 0), expected 0 to 99 with model.vocab_size 100"
    )
    assert refusal(config) == expected
    # A description does not spare the data the look at it.
    describe(tmp_path / "a", largest_token=99)
    assert refusal(config) == expected


def test_vocabulary_is_checked_again_when_the_tokens_change(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path / "a", vocab_size=100)
    make_dataset(tmp_path / "a", [[1] * 50])
    assert build_samples(config, "train", 1)[0].max() == 1
    make_dataset(tmp_path / "a", [[1] * 49 + [100]])
    os.utime(tmp_path / "a.bin", ns=(0, 0))
    assert "has the token id 100" in refusal(config)


def test_description_of_other_data_is_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "a", [[1] * 50])
    describe(tmp_path / "a", dataset="1" * 32)
    assert refusal(make_config(tmp_path, tmp_path / "a")) == (
        f"{tmp_path / 'a.json'}: describes the dataset {'1' * 32}, "
        f"but the files beside it are {dataset.fingerprint}"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[" * 100_000, '{"dataset": 1}'])
def test_damaged_description_is_refused(tmp_path: Path, content: str) -> None:
    make_dataset(tmp_path / "a", [[1] * 50])
    (tmp_path / "a.json").write_text(content)
    message = refusal(make_config(tmp_path, tmp_path / "a"))
    assert message.startswith(f"{tmp_path / 'a.json'}: ")


def test_data_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [[1] * 50])
    tokenizer = make_tokenizer_file(tmp_path / "tokenizer.json")
    config = make_config(tmp_path, tmp_path / "a", tokenizer=tokenizer)
    assert len(build_samples(config, "train", 1)) > 0

    fingerprint = load_tokenizer(tokenizer).fingerprint
    describe(tmp_path / "a", tokenizer=fingerprint)
    assert len(build_samples(config, "train", 1)) > 0

    describe(tmp_path / "a")
    assert refusal(config) == (
        f"{tmp_path / 'a.json'}: the data was made with tokenizer {'0' * 32}, "
        f"but data.tokenizer {tokenizer} is {fingerprint}"
    )


def read_all(loader: MicrobatchLoader) -> list[tuple[list[int], list[list[int]]]]:
    return [
        (batch["samples"].tolist(), batch["tokens"].tolist())
        for consumed in (0, 8)
        for batch in loader.read(consumed, 8, 2)
    ]


def test_microbatches_hold_the_samples_of_their_rank(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "a", random_documents(1, 60, 30))
    samples = build_samples(make_config(tmp_path, dataset.prefix), "train", 20)
    for rank, numbers in enumerate(
        [[[0, 1], [4, 5], [8, 9], [12, 13]], [[2, 3], [6, 7], [10, 11], [14, 15]]]
    ):
        expected = [(pair, [samples[i].tolist() for i in pair]) for pair in numbers]
        assert read_all(MicrobatchLoader(samples, rank, 2)) == expected


def test_microbatches_are_int64_tensors(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "a", random_documents(1, 60, 30), "uint16")
    samples = build_samples(make_config(tmp_path, dataset.prefix), "train", 20)
    (batch,) = MicrobatchLoader(samples, 0, 1).read(0, 3, 3)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in batch.items()} == {
        "tokens": (torch.int64, (3, SEQ_LENGTH + 1)),
        "samples": (torch.int64, (3,)),
    }


def test_reading_beyond_the_last_sample_is_refused() -> None:
    loader = MicrobatchLoader([np.zeros(3, np.int64)] * 10, 0, 1)
    assert len(list(loader.read(8, 2, 1))) == 2
    with pytest.raises(ValueError, match="a batch of 2 after 9 samples goes beyond the 10 samples"):
        loader.read(9, 2, 1)
