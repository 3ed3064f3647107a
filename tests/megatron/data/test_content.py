"""Data is known by its content, wherever it lies; what the model cannot read is found before."""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron.data import content
from megatron.data.content import Findings, read_content
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.loader import build_samples
from megatron.errors import DataError
from megatron.hashing import HASH_PART, hash_array, hash_file
from tests.megatron.data.test_loader import describe, make_config, refusal
from tests.megatron.data.test_samples import make_dataset, random_documents


def hash_of(prefix: Path) -> str:
    return read_content(IndexedDataset(prefix))[0]


def test_every_flipped_bit_is_other_content(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "a", [[1, 2, 3], [4]], "uint16")
    path = tmp_path / "a.bin"
    before = path.read_bytes()
    hashes = {hash_of(dataset.prefix)}
    for bit in range(8 * len(before)):
        changed = bytearray(before)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        hashes.add(hash_of(dataset.prefix))
    assert len(hashes) == 1 + 8 * len(before)


def test_copy_has_the_same_content(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [[1, 2, 3], [4]])
    for suffix in ("bin", "idx"):
        shutil.copy(tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}")
    assert hash_of(tmp_path / "a") == hash_of(tmp_path / "b")


@pytest.mark.parametrize("count", [0, 1, HASH_PART // 4, HASH_PART // 4 + 1, HASH_PART])
def test_array_has_the_hash_of_a_file_of_its_bytes(tmp_path: Path, count: int) -> None:
    array = np.arange(count, dtype=np.uint32)
    (tmp_path / "a").write_bytes(array.tobytes())
    assert hash_file(tmp_path / "a") == hash_array(array)
    (tmp_path / "a").write_bytes(b"header" + array.tobytes() + b"end")
    assert hash_file(tmp_path / "a", 6, 6 + array.nbytes) == hash_array(array)


def test_range_of_tokens_is_found_over_all_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.hashing.HASH_PART", 64)
    for seed in range(20):
        documents = random_documents(seed, 30, 20)
        dataset = make_dataset(tmp_path / "a", documents)
        tokens = [token for document in documents for token in document]
        assert read_content(dataset)[1:] == (min(tokens), max(tokens))


def test_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "a", [[1, 2, 3], [4]])
    with pytest.raises(OSError, match="ends at byte 16"):
        hash_file(tmp_path / "a.bin", 0, 17)
    os.remove(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a\.bin: cannot be read: No such file"):
        read_content(dataset)


def test_file_is_read_again_when_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    monkeypatch.setattr(content, "_REST_SECONDS", -1.0)
    monkeypatch.setattr(content, "read_content", lambda it: reads.append(it) or read_content(it))
    prefix = make_dataset(tmp_path / "a", [[1, 2, 3], [4]]).prefix
    found = [Findings().open(str(prefix), tmp_path)[1].hash for _ in range(2)]
    assert found[0] == found[1]
    assert len(reads) == 1
    times = (tmp_path / "a.bin").stat()
    with (tmp_path / "a.bin").open("r+b") as file:
        file.write(b"\7")
    # Even where the time of the change is taken back.
    os.utime(tmp_path / "a.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Findings().open(str(prefix), tmp_path)[1].hash != found[0]
    assert len(reads) == 2


def test_file_that_was_just_written_is_not_known_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    monkeypatch.setattr(content, "read_content", lambda it: reads.append(it) or read_content(it))
    prefix = make_dataset(tmp_path / "a", [[1, 2, 3], [4]]).prefix
    for _ in range(2):
        Findings().open(str(prefix), tmp_path)
    assert len(reads) == 2


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_place_of_the_first_wrong_token_is_named(
    tmp_path: Path, seed: int, described: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "_TOKENS_AT_ONCE", 7)
    choose = random.Random(seed)
    documents = [[choose.randrange(90) for _ in range(choose.randrange(12))] for _ in range(20)]
    documents.append([1] * 30)
    document = choose.choice([i for i, ids in enumerate(documents) if ids])
    position = choose.randrange(len(documents[document]))
    documents[document][position] = choose.choice([100, 101, 32000])
    dtype = choose.choice(["uint16", "int32", "int64"])
    make_dataset(tmp_path / "a", documents, dtype)
    if described:
        describe(tmp_path / "a", largest_token=5)
    byte = np.dtype(dtype).itemsize * (sum(map(len, documents[:document])) + position)
    message = refusal(make_config(tmp_path, tmp_path / "a", vocab_size=100, split=(1, 0, 0)))
    assert f"{tmp_path / 'a.bin'}: has the token id {documents[document][position]} " in message
    assert f"at byte {byte} (document {document}, token {position} of it" in message


def test_description_of_other_tokens_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [[1] * 50])
    describe(tmp_path / "a", content=hash_of(tmp_path / "a"))
    config = make_config(tmp_path, tmp_path / "a")
    assert len(build_samples(config, "train", 1)) > 0
    make_dataset(tmp_path / "a", [[1] * 49 + [2]])
    message = refusal(config)
    assert message.startswith(f"{tmp_path / 'a.json'}: describes tokens of the hash ")
    assert hash_of(tmp_path / "a") in message
