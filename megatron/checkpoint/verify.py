"""Compare the files of a save with its manifest.

    check                              refuses
    a regular file of the folder       what was deleted, links that lead out
    its size                           what was cut short
    its hash                           a flipped bit, swapped files
    dtypes and shapes of its tensors   what is no safetensors file, or not the one that is described

The last holds even where somebody has made the hashes fit.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError, safe_open

from megatron.checkpoint.format import DTYPE_CODES, Manifest, find_member
from megatron.errors import CheckpointError
from megatron.hashing import hash_file

# Of each tensor in a file, by its key: dtype code and shape.
Header: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]


def find_damages(folder: Path, manifest: Manifest, names: Iterable[str], verify: bool) -> list[str]:
    """What is wrong with the files ``names`` of the save ``folder``: a message for each bad one.

    Without ``verify``, hashes are not compared.
    """
    tensors = _tensors_by_file(manifest)
    damages = []
    for name in names:
        try:
            _check_file(folder, manifest, name, tensors[name], verify)
        except CheckpointError as error:
            damages.append(str(error))
        except (OSError, SafetensorError) as error:
            damages.append(f"{folder / name}: cannot be read: {error}")
    return damages


def _tensors_by_file(manifest: Manifest) -> defaultdict[str, Header]:
    """For each file, the keys of its tensors, with dtype code and shape."""
    tensors: defaultdict[str, Header] = defaultdict(dict)
    for tensor in manifest.tensors:
        for box in tensor.boxes:
            tensors[box.file][box.key] = (DTYPE_CODES[tensor.dtype], box.shape)
    return tensors


def _check_file(folder: Path, manifest: Manifest, name: str, tensors: Header, verify: bool) -> None:
    path, stored = find_member(folder, name), manifest.files[name]
    size = path.stat().st_size
    if size != stored.bytes:
        raise CheckpointError(f"{path}: is damaged: {size} bytes long, expected {stored.bytes}")
    if verify and hash_file(path) != stored.hash:
        raise CheckpointError(f"{path}: is damaged: its content does not match its hash")
    if tensors and _header(path) != tensors:
        raise CheckpointError(f"{path}: does not hold the tensors that the manifest names")


def _header(path: Path) -> Header:
    with safe_open(path, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
