import struct
from pathlib import Path

import numpy as np
import pytest

from megatron.data.content import read_content
from megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, dtype_for_vocab
from megatron.errors import DataError, DiskError
from tests.megatron.data import reference

DOCUMENTS = [[5, 6, 7], [], [65000, 1], [2], []]


def write(prefix: Path, documents: list[list[int]], dtype: str = "int32") -> None:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.add(ids)
            writer.end_document()


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
@pytest.mark.parametrize("documents", [DOCUMENTS, [[1]], [[]], []])
def test_files_equal_the_format_byte_for_byte(
    tmp_path: Path, dtype: str, documents: list[list[int]]
) -> None:
    write(tmp_path / "a", documents, dtype)
    assert (tmp_path / "a.bin").read_bytes() == reference.bin_bytes(documents, dtype)
    assert (tmp_path / "a.idx").read_bytes() == reference.idx_bytes(documents, dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_sequences_are_read_back(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "a.b.bin").write_bytes(reference.bin_bytes(DOCUMENTS, dtype))
    (tmp_path / "a.b.idx").write_bytes(reference.idx_bytes(DOCUMENTS, dtype))
    dataset = IndexedDataset(tmp_path / "a.b")
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert [dataset[i].dtype for i in range(len(dataset))] == [np.dtype(dtype)] * len(DOCUMENTS)
    assert dataset.sizes.tolist() == [3, 0, 2, 1, 0]
    assert dataset.document_boundaries.tolist() == [0, 1, 2, 3, 4, 5]
    assert dataset[-2].tolist() == [2]
    assert dataset.get(0, offset=1).tolist() == [6, 7]
    assert dataset.get(0, offset=1, length=1).tolist() == [6]
    assert read_content(dataset)[1:] == (1, 65000)


def test_dataset_without_sequences_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / "a", [])
    dataset = IndexedDataset(tmp_path / "a")
    assert len(dataset) == 0
    assert read_content(dataset)[1:] == (0, 0)
    with pytest.raises(IndexError):
        dataset[0]


def test_document_of_several_sequences_keeps_its_boundaries(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
        writer.add([1, 2])
        writer.add(np.array([3]))
        writer.end_document()
        writer.add([4])
        writer.end_document()
    dataset = IndexedDataset(tmp_path / "a")
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[1, 2], [3], [4]]
    assert dataset.document_boundaries.tolist() == [0, 2, 3]


def test_tokens_are_read_only(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    with pytest.raises(ValueError, match="read-only"):
        IndexedDataset(tmp_path / "a")[0][0] = 1


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65499, "uint16"), (65500, "int32"), (250880, "int32")]
)
def test_dtype_follows_the_vocabulary(vocab_size: int, dtype: str) -> None:
    assert dtype_for_vocab(vocab_size) == np.dtype(dtype)


def test_fingerprint_depends_on_lengths_and_not_on_the_name(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    write(tmp_path / "b", DOCUMENTS)
    write(tmp_path / "c", [*DOCUMENTS[:-1], [1]])
    write(tmp_path / "d", DOCUMENTS, "uint16")
    a, b, c, d = (IndexedDataset(tmp_path / name).fingerprint for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


@pytest.mark.parametrize("token", [65536, -1, 1.5])
def test_token_that_does_not_fit_is_refused(tmp_path: Path, token: float) -> None:
    with (
        pytest.raises(DataError, match=f"token id {token} does not fit uint16"),
        IndexedDatasetWriter(tmp_path / "a", "uint16") as writer,
    ):
        writer.add([1, token])


def test_floating_point_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be stored as float64"):
        IndexedDatasetWriter(tmp_path / "a", "float64")


def write_and_fail(prefix: Path) -> None:
    with IndexedDatasetWriter(prefix, "int32") as writer:
        writer.add([9] * 100)
        raise KeyError


def test_failed_writer_leaves_the_old_files(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyError):
        write_and_fail(tmp_path / "a")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_file_has_its_name_before_the_end(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", "int32") as writer:
        writer.add([1, 2, 3])
        assert not (tmp_path / "a.bin").exists()
        assert not (tmp_path / "a.idx").exists()


def test_folder_that_is_missing_is_a_disk_error(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskError, match=r"missing/a.bin: cannot be written: No such file"),
        IndexedDatasetWriter(tmp_path / "missing" / "a", "int32"),
    ):
        pass


def refusal(prefix: Path) -> str:
    with pytest.raises(DataError) as caught:
        IndexedDataset(prefix)
    message = str(caught.value)
    assert message.count("\n") <= 1
    return message


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_file_is_refused(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "a", DOCUMENTS)
    (tmp_path / f"a.{suffix}").unlink()
    assert refusal(tmp_path / "a") == (
        f"{tmp_path / 'a'}.{suffix}: cannot be read: No such file or directory"
    )


@pytest.mark.parametrize("change", [-1, 1])
def test_bin_of_wrong_length_is_refused(tmp_path: Path, change: int) -> None:
    write(tmp_path / "a", DOCUMENTS)
    path = tmp_path / "a.bin"
    path.write_bytes((path.read_bytes() + b"\x00")[: 24 + change])
    assert refusal(tmp_path / "a") == (
        f"{path}: has {24 + change} bytes, but a.idx describes 6 tokens of int32, "
        "which are 24 bytes"
    )


def test_every_truncation_of_the_idx_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    path = tmp_path / "a.idx"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert f"{path}: has {length} bytes" in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"X", r"begins with b'XMIDIDX\x00\x00', but an index begins with b'MMIDIDX\x00\x00'"),
        (9, b"\x02", "has version 2, expected 1"),
        (17, b"\x06", "has dtype code 6, expected one of 1 (uint8), 2 (int8)"),
        (18, b"\x06", "but its header describes 6 sequences and 6 document boundaries"),
        (26, b"\xff" * 8, f"5 sequences and {2**64 - 1} document boundaries"),
        (34 + 4, struct.pack("<i", -1), "sequence 1 has -1 tokens, expected 0 or more"),
        (34 + 4, b"\x01", "sequence 2 begins at byte 12, but the sequences before it end at byte"),
        (34 + 20 + 8, b"\x10", "sequence 1 begins at byte 16, but the sequences before it end at"),
        (34 + 60, b"\x01", "has the document boundaries [1, 1, 2, 3, 4, 5]"),
        (34 + 60 + 40, b"\x06", "[0, 1, 2, 3, 4, 6], expected them to rise from 0 to at most 5"),
        (34 + 60 + 16, b"\x00", "has the document boundaries [0, 1, 0, 3, 4, 5]"),
    ],
)
def test_damaged_idx_is_refused(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    write(tmp_path / "a", DOCUMENTS)
    path = tmp_path / "a.idx"
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)
    found = refusal(tmp_path / "a")
    assert found.startswith(f"{path}: ")
    assert message in found


def test_idx_of_another_dataset_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    write(tmp_path / "b", DOCUMENTS[:3])
    (tmp_path / "b.idx").replace(tmp_path / "a.idx")
    assert "a.bin: has 24 bytes, but a.idx describes 5 tokens" in refusal(tmp_path / "a")
