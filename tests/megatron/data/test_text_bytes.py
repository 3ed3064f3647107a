"""Losses per byte divide by the text behind the tokens that were evaluated."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.description import description_path, read_description, write_description
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.loader import build_samples
from megatron.data.text_bytes import (
    bytes_per_token,
    read_text_bytes,
    text_bytes_path,
    write_text_bytes,
)
from megatron.errors import DataError
from tests.megatron.data.test_loader import SEQ_LENGTH, describe, make_config
from tests.megatron.data.test_samples import make_dataset, random_documents


def make_text(prefix: Path, documents: list[list[int]], lengths: list[int]) -> IndexedDataset:
    make_dataset(prefix, documents)
    describe(prefix, text_bytes=write_text_bytes(prefix, lengths))
    return IndexedDataset(prefix)


def numbered(seed: int, count: int) -> tuple[list[list[int]], list[int]]:
    """Documents whose tokens say in which document they are, and the lengths of their texts."""
    sizes = [len(ids) for ids in random_documents(seed, count, 30)]
    lengths = np.random.default_rng(seed).integers(1, 200, count).tolist()
    return [[number] * size for number, size in enumerate(sizes)], lengths


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_samples", [1, 3, 40])
def test_text_is_that_of_the_predicted_tokens(tmp_path: Path, seed: int, num_samples: int) -> None:
    prefixes = [tmp_path / name for name in "ab"]
    made = [numbered(2 * seed + number, 60) for number in range(2)]
    lengths: list[Any] = []
    for number, (documents, of_texts) in enumerate(made):
        moved = [[token + 100 * number for token in ids] for ids in documents]
        make_text(prefixes[number], moved, of_texts)
        lengths += [
            length / max(1, len(ids)) for length, ids in zip(of_texts, documents, strict=True)
        ]
        lengths += [0.0] * (100 - len(documents))
    samples = build_samples(make_config(tmp_path, *prefixes, split=(1, 1, 0)), "valid", num_samples)
    predicted = [int(token) for index in range(num_samples) for token in samples[index][1:]]
    assert len(predicted) == num_samples * SEQ_LENGTH
    mean = sum(lengths[token] for token in predicted) / len(predicted)
    assert bytes_per_token(samples, num_samples) == pytest.approx(mean, rel=1e-12)


def test_other_split_does_not_count(tmp_path: Path) -> None:
    documents = [[1] * 20 for _ in range(40)]
    make_text(tmp_path / "a", documents, [20] * 20 + [80] * 20)
    config = make_config(tmp_path, tmp_path / "a", split=(1, 1, 0))
    assert bytes_per_token(build_samples(config, "train", 30), 30) == 1.0
    assert bytes_per_token(build_samples(config, "valid", 30), 30) == 4.0


def test_long_texts_take_wider_numbers(tmp_path: Path) -> None:
    make_text(tmp_path / "narrow", [[1], [2, 3]], [5, 2**32 - 1])
    dataset = make_text(tmp_path / "wide", [[1], [2, 3]], [5, 2**32])
    assert text_bytes_path(tmp_path / "narrow").stat().st_size == 8
    assert text_bytes_path(tmp_path / "wide").stat().st_size == 16
    lengths = read_text_bytes(dataset)
    assert lengths is not None
    assert lengths.tolist() == [5, 2**32]


def valid(folder: Path) -> float | None:
    config = make_config(folder, folder / "a", split=(1, 1, 0))
    return bytes_per_token(build_samples(config, "valid", 10), 10)


@pytest.mark.parametrize("missing", ["a.json", "a.bytes", "the hash"])
def test_unknown_text_is_unknown(tmp_path: Path, missing: str) -> None:
    make_text(tmp_path / "a", [[1] * 20] * 10, [20] * 10)
    assert valid(tmp_path) == 1.0
    if missing == "the hash":
        description = read_description(tmp_path / "a")
        assert description is not None
        describe(tmp_path / "a")
    else:
        (tmp_path / missing).unlink()
    assert valid(tmp_path) is None


def test_every_damage_to_the_lengths_is_refused(tmp_path: Path) -> None:
    make_text(tmp_path / "a", [[1] * 20] * 10, [20] * 10)
    path = text_bytes_path(tmp_path / "a")
    before = path.read_bytes()
    damaged = [before[:-1], before[:-4], b"", before + b"\0", before + before]
    for bit in range(8 * len(before)):
        changed = bytearray(before)
        changed[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(changed))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.bytes: is not the file that a\.json describes"):
            valid(tmp_path)


def test_description_without_the_newer_fields_is_read(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [[1] * 20])
    describe(tmp_path / "a")
    assert b"content" not in description_path(tmp_path / "a").read_bytes()
    description = read_description(tmp_path / "a")
    assert description is not None
    assert (description.content, description.text_bytes) == (None, None)
    write_description(tmp_path / "a", description)
    assert read_description(tmp_path / "a") == description
