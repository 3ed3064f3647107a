"""What a manifest says, and which manifests are refused."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.format import (
    MANIFEST,
    Manifest,
    StoredBox,
    StoredFile,
    StoredTensor,
    check_file_name,
    decode_manifest,
    encode_manifest,
    read_manifest,
)
from megatron.errors import CheckpointError
from megatron.hashing import HASH_PART, hash_file
from tests.megatron.checkpoint.sample import edit_manifest, read_fields, save, sign_manifest

FILE = "rank-00000.safetensors"


def manifest(*boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Manifest:
    """One tensor of shape (4, 6) stored in ``boxes`` of (start, shape)."""
    stored = tuple(StoredBox(FILE, str(i), start, shape) for i, (start, shape) in enumerate(boxes))
    return Manifest(
        state={"step": 3, "loss": 0.1},
        config={"name": "\u00e9"},
        layout={},
        tensors=(StoredTensor("weight", "w", (4, 6), "float32", stored),),
        files={FILE: StoredFile(bytes=5, hash="ab")},
    )


def test_manifest_survives_encoding() -> None:
    written = manifest(((0, 0), (4, 3)), ((0, 3), (4, 3)))
    assert decode_manifest(encode_manifest(written)) == written


def test_manifest_is_json_that_starts_with_the_hash_of_the_rest() -> None:
    data = encode_manifest(manifest(((0, 0), (4, 6))))
    fields = json.loads(data)
    assert fields["format"] == 1
    rest = data[len('{"hash":"') + 64 + len('",') :]
    assert fields["hash"] == hashlib.sha256(rest).hexdigest()


def test_every_flipped_bit_of_a_manifest_is_refused() -> None:
    data = bytearray(encode_manifest(manifest(((0, 0), (4, 6)))))
    for position in range(8 * len(data)):
        data[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError, match="manifest|damaged"):
            decode_manifest(bytes(data))
        data[position // 8] ^= 1 << position % 8
    decode_manifest(bytes(data))


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (4, 6))],
        [((0, 0), (1, 6)), ((3, 0), (1, 6)), ((1, 0), (2, 6))],
        [((0, 0), (2, 3)), ((0, 3), (2, 3)), ((2, 0), (2, 3)), ((2, 3), (2, 3))],
        # A pinwheel, which no straight cut divides.
        [((0, 0), (1, 4)), ((0, 4), (3, 2)), ((3, 2), (1, 4)), ((1, 0), (3, 2)), ((1, 2), (2, 2))],
    ],
)
def test_boxes_that_tile_are_accepted(boxes: list[Any]) -> None:
    decode_manifest(encode_manifest(manifest(*boxes)))


@pytest.mark.parametrize(
    "boxes",
    [
        [],
        [((0, 0), (4, 5))],
        [((0, 0), (2, 6)), ((1, 0), (2, 6))],
        [((0, 0), (4, 6)), ((0, 0), (4, 6))],
        [((0, 0), (4, 3)), ((0, 2), (4, 3))],
        # As many elements as the tensor has, in the wrong place.
        [((0, 0), (3, 4)), ((2, 2), (2, 4)), ((0, 4), (1, 2)), ((0, 5), (2, 1))],
    ],
)
def test_boxes_that_do_not_tile_are_refused(boxes: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"do not tile shape \(4, 6\)"):
        decode_manifest(encode_manifest(manifest(*boxes)))


def test_box_of_another_number_of_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match="number of dimensions"):
        decode_manifest(encode_manifest(manifest(((0,), (24,)))))


def test_scalar_stored_twice_is_refused() -> None:
    scalar = StoredTensor("weight", "w", (), "float32", (StoredBox(FILE, "a", (), ()),) * 2)
    with pytest.raises(ValueError, match="do not tile"):
        decode_manifest(encode_manifest(replace(manifest(), tensors=(scalar,))))


@pytest.mark.parametrize("name", ["a", "tokenizer/merges.txt", "a b", "..a", "caf\u00e9"])
def test_plain_file_names_are_accepted(name: str) -> None:
    assert check_file_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../../x", "a/../x", "/x", "a//b", "./a", "a/", "a\\b", "a\n", "a\0", MANIFEST],
)
def test_file_name_that_could_leave_the_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        check_file_name(name)


def rename_file(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields["files"].update({name: fields["files"].pop(FILE)})


def set_tensor(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields["tensors"][0].update(values)


def set_box(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields["tensors"][0]["boxes"][0].update(values)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (rename_file("../../x"), "'../../x' cannot be the name"),
        (rename_file("/tmp/x"), "'/tmp/x' cannot be the name"),
        (rename_file("x"), f"file '{FILE}' is not listed"),
        (lambda fields: fields.update(format=2), "has format 2, but only format 1 is known"),
        (lambda fields: fields.update(format=True), "format must be int, found True"),
        (lambda fields: fields.pop("state"), "state must be dict, found None"),
        (lambda fields: fields.update(files=[]), r"files must be dict, found \[\]"),
        (lambda fields: fields.update(tensors=[3]), "kind must be str, found None"),
        (lambda fields: fields["tensors"].append(fields["tensors"][0]), "lists a tensor twice"),
        (set_tensor(dtype="object"), "dtype 'object' is none of"),
        (set_tensor(shape=[8, 6.0]), "shape must hold whole numbers from 1 on"),
        (set_tensor(shape=[0, 6]), "shape must hold whole numbers from 1 on"),
        (set_tensor(shape=[2**70, 6]), "shape must hold whole numbers from 1 on"),
        (set_tensor(shape=[9, 6]), "do not tile"),
        (set_box(start=[-1, 0]), "start must hold whole numbers from 0 on"),
        (set_box(start=[1, 0]), "reaches out of shape"),
        (set_box(shape=[7, 6]), "do not tile"),
        (set_box(file="x"), "file 'x' is not listed"),
    ],
)
def test_manifest_edited_by_hand_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    path = save(tmp_path)
    edit_manifest(path, edit)
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: .*{complaint}"):
        read_manifest(path)


def test_manifest_of_endless_brackets_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    sign_manifest(path, '{"format":' + "[" * 10**6)
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(path)


def test_manifest_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "run")
    (path / MANIFEST).rename(tmp_path / "elsewhere")
    (path / MANIFEST).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        read_manifest(path)


def test_manifest_lists_every_other_file(tmp_path: Path) -> None:
    path = save(tmp_path)
    present = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    assert set(read_fields(path)["files"]) == present - {MANIFEST}


@pytest.mark.parametrize("length", [0, 1, HASH_PART, 2 * HASH_PART + 3])
def test_hash_of_a_file_is_the_hash_of_the_hashes_of_its_parts(tmp_path: Path, length: int) -> None:
    data = os.urandom(length)
    path = tmp_path / "file"
    path.write_bytes(data)
    parts = [data[i : i + HASH_PART] for i in range(0, length, HASH_PART)]
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    assert hash_file(path) == hashlib.sha256(digests).hexdigest()
