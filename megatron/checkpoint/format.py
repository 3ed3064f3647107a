"""The format of a save: the files of its folder, and the manifest that describes them.

    step-00000100/
        rank-00000.safetensors      the tensors that rank 0 owns, each cut into boxes
        rank-00001.safetensors      ...
        tokenizer/tokenizer.json    files that the caller handed in
        manifest.json               written last: what is where, and the hash of every file

A tensor is stored by its kind and logical name, as boxes that tile it exactly once. Which rank
wrote a box means nothing, so that any layout reads what any other layout wrote. Drawn for a weight
of shape (4, 6) that two ranks cut along dimension 1:

    box of the whole tensor       file                       key in the file
    start (0, 0), shape (4, 3)    rank-00000.safetensors     weight/mlp.weight/0
    start (0, 3), shape (4, 3)    rank-00001.safetensors     weight/mlp.weight/0

The manifest is one JSON object:

    hash      of all bytes of the manifest that follow this field
    format    FORMAT_VERSION
    state     what the run needs to go on: step, consumed samples, ...
    config    the configuration of the run that wrote it
    layout    the rank grid that wrote it, for people
    tensors   [{kind, name, shape, dtype, boxes: [{file, key, start, shape}]}]
    files     {name: {bytes, hash}}, every file but the manifest

Hashes are those of megatron/hashing.py.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias, TypeVar

import numpy as np

from megatron.errors import CheckpointError
from megatron.hashing import HASH_DIGITS, digest

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

# What a dtype is called in the manifest, and in the header of a safetensors file.
DTYPE_CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}

# The manifest starts with its own hash: HEAD, hexadecimal digits, TAIL, hashed bytes.
HEAD, TAIL = b'{"hash":"', b'",'

JSON: TypeAlias = "None | bool | int | float | str | Sequence[JSON] | Mapping[str, JSON]"
TensorKey: TypeAlias = tuple[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class StoredBox:
    """A box of a stored tensor, and the tensor of a safetensors file that holds it."""

    file: str
    key: str
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor of a save: its boxes tile ``shape``."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[StoredBox, ...]

    @property
    def key(self) -> TensorKey:
        """What identifies the tensor in a save."""
        return self.kind, self.name


@dataclass(frozen=True)
class StoredFile:
    """Size and hash of a file of a save."""

    bytes: int
    hash: str


@dataclass(frozen=True)
class Manifest:
    """What a save holds; the fields are described at the head of this module."""

    state: dict[str, Any]
    config: dict[str, Any]
    layout: dict[str, Any]
    tensors: tuple[StoredTensor, ...]
    files: dict[str, StoredFile]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the save ``folder``.

    Raises:
        CheckpointError: if it is missing, damaged, of another format, or contradicts itself.
    """
    path = folder / MANIFEST
    try:
        return decode_manifest(find_member(folder, MANIFEST).read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def find_member(folder: Path, name: str) -> Path:
    """The path of file ``name`` of the save ``folder``.

    Raises:
        CheckpointError: if it is not a regular file, or is a link that leaves the folder.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing, or is not a regular file")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{path}: is a link to {path.resolve()}, outside of the checkpoint")
    return path


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json."""
    fields = {"format": FORMAT_VERSION, **asdict(manifest)}
    body = json.dumps(fields, allow_nan=False, separators=(",", ":")).encode()[1:]
    return HEAD + digest(body).hex().encode() + TAIL + body


def decode_manifest(data: bytes) -> Manifest:
    """The manifest in the bytes of manifest.json.

    Raises:
        ValueError: if a byte has changed, a field is missing or of another type, a file name leaves
            the folder, or boxes do not tile their tensor.
    """
    end = len(HEAD) + HASH_DIGITS
    written, body = data[len(HEAD) : end], data[end + len(TAIL) :]
    if not data.startswith(HEAD) or data[end : end + len(TAIL)] != TAIL:
        raise ValueError("is not the manifest of a checkpoint")
    if written != digest(body).hex().encode():
        raise ValueError("is damaged: it does not match the hash at its start")
    fields = json.loads(b"{" + body)
    version = _field(fields, "format", int)
    if version != FORMAT_VERSION:
        raise ValueError(f"has format {version}, but only format {FORMAT_VERSION} is known")
    manifest = _parse_manifest(fields)
    _check_references(manifest)
    return manifest


def _parse_manifest(fields: object) -> Manifest:
    return Manifest(
        state=_field(fields, "state", dict),
        config=_field(fields, "config", dict),
        layout=_field(fields, "layout", dict),
        tensors=tuple(_parse_tensor(table) for table in _field(fields, "tensors", list)),
        files={
            check_file_name(name): StoredFile(
                bytes=_field(table, "bytes", int), hash=_field(table, "hash", str)
            )
            for name, table in _field(fields, "files", dict).items()
        },
    )


def _parse_tensor(table: object) -> StoredTensor:
    tensor = StoredTensor(
        kind=_field(table, "kind", str),
        name=_field(table, "name", str),
        shape=_sizes(table, "shape", least=1),
        dtype=_field(table, "dtype", str),
        boxes=tuple(
            StoredBox(
                file=_field(box, "file", str),
                key=_field(box, "key", str),
                start=_sizes(box, "start", least=0),
                shape=_sizes(box, "shape", least=1),
            )
            for box in _field(table, "boxes", list)
        ),
    )
    if tensor.dtype not in DTYPE_CODES:
        raise ValueError(
            f"{tensor.key}: dtype {tensor.dtype!r} is none of {', '.join(DTYPE_CODES)}"
        )
    _check_tiling(tensor)
    return tensor


def _field(table: object, name: str, kind: type[T]) -> T:
    value = table.get(name) if isinstance(table, dict) else None
    # A bool is an int to isinstance.
    if type(value) is not kind:
        raise ValueError(f"{name} must be {kind.__name__}, found {value!r:.60}")
    return value


def _sizes(table: object, name: str, least: int) -> tuple[int, ...]:
    values = _field(table, name, list)
    if not all(type(value) is int and least <= value < 2**62 for value in values):
        raise ValueError(f"{name} must hold whole numbers from {least} on, found {values!r:.60}")
    return tuple(values)


def check_file_name(name: str) -> str:
    """Return ``name`` if it is that of a file in the folder of a save or below, written plainly.

    Raises:
        ValueError: if it is not.
    """
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and str(path) == name and bool(path.name)
    if not plain or path.is_absolute() or ".." in path.parts or name == MANIFEST:
        raise ValueError(f"{name!r:.60} cannot be the name of a file of a checkpoint")
    return name


def _check_references(manifest: Manifest) -> None:
    keys = [tensor.key for tensor in manifest.tensors]
    if len(set(keys)) != len(keys):
        raise ValueError("lists a tensor twice")
    for tensor in manifest.tensors:
        for box in tensor.boxes:
            if box.file not in manifest.files:
                raise ValueError(f"{tensor.key}: file {box.file!r:.60} is not listed")


def _check_tiling(tensor: StoredTensor) -> None:
    for box in tensor.boxes:
        if not len(box.start) == len(box.shape) == len(tensor.shape):
            raise ValueError(
                f"{tensor.key}: a box has another number of dimensions than the tensor"
            )
        ends = (first + n for first, n in zip(box.start, box.shape, strict=True))
        if any(end > n for end, n in zip(ends, tensor.shape, strict=True)):
            raise ValueError(
                f"{tensor.key}: the box at {box.start} of shape {box.shape} "
                f"reaches out of shape {tensor.shape}"
            )
    covered = sum(math.prod(box.shape) for box in tensor.boxes)
    if covered != math.prod(tensor.shape) or _overlap(tensor.boxes):
        raise ValueError(f"{tensor.key}: the boxes do not tile shape {tensor.shape} exactly once")


def _overlap(boxes: Sequence[StoredBox]) -> bool:
    """Whether two of the boxes, of one number of dimensions, share an element."""
    if len(boxes) < 2:
        return False
    starts = np.array([box.start for box in boxes], dtype=np.int64)
    ends = starts + np.array([box.shape for box in boxes], dtype=np.int64)
    # Sorted along the dimension with the most cuts, few boxes can reach into a later one.
    dim = max(range(starts.shape[1]), key=lambda d: len(np.unique(starts[:, d])), default=0)
    order = np.argsort(starts[:, dim])
    starts, ends = starts[order], ends[order]
    stops = np.searchsorted(starts[:, dim], ends[:, dim])
    for index, stop in enumerate(stops):
        later = slice(index + 1, stop)
        if np.any(np.all((starts[later] < ends[index]) & (starts[index] < ends[later]), axis=1)):
            return True
    return False
