"""Write a save: complete under its final name, or not there at all.

    all ranks    sum up the bytes                   is there room?
    rank 0       make a folder of temporary name
    all ranks    write, flush and hash one file each
    rank 0       write the other files and the manifest, flush, rename, flush, remove old saves

The ranks wait for each other after every line and fail together, so that a rank on a full disk ends
the save everywhere. The temporary folder then goes, and older saves are as they were.
"""

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed import ProcessGroup

from megatron.checkpoint.folders import (
    is_valid,
    remove_leftovers,
    remove_old,
    set_aside,
    step_folder,
    temporary_folder,
)
from megatron.checkpoint.format import (
    JSON,
    MANIFEST,
    Manifest,
    StoredBox,
    StoredFile,
    StoredTensor,
    TensorKey,
    check_file_name,
    decode_manifest,
    encode_manifest,
)
from megatron.errors import CheckpointError, DiskError
from megatron.hashing import hash_file
from megatron.together import gather_on_first, run_on_first
from mpu.sharding import ShardedTensor


@dataclass(frozen=True)
class _Part:
    """What one rank has written: the tensors, each with this rank's boxes only, and the files."""

    tensors: list[StoredTensor]
    files: dict[str, StoredFile]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Iterable[ShardedTensor],
    *,
    state: Mapping[str, JSON],
    config: Mapping[str, JSON],
    layout: Mapping[str, JSON],
    files: Mapping[str, bytes],
    group: ProcessGroup | None,
    keep_last: int,
    guard: Callable[[], None] = lambda: None,
) -> Path:
    """Save ``tensors`` and the rest as ``folder``/step-<step> and return that path.

    Collective over ``group``, whose ranks share the folder; None if this process is alone. Rank 0
    decides on everything but ``tensors``. Only one run may save into a folder at a time.

    Args:
        tensors: what this rank holds; it writes those that it owns.
        files: names, relative to the save, and contents of files to keep with it.
        keep_last: whole saves to keep, this one included; 0 keeps all.
        guard: called on rank 0 before it changes the folder; raises if that belongs to another run.

    Raises:
        DiskError: on every rank, if there is no room or a file cannot be written.
        CheckpointError: on every rank, if the step is saved already, or the ranks' tensors do not
            make up whole ones.
    """
    owned = [tensor for tensor in tensors if tensor.owned]
    rank = 0 if group is None else group.rank()
    about = Manifest(
        state=dict(state), config=dict(config), layout=dict(layout), tensors=(), files={}
    )
    target = step_folder(folder, step)
    needed = sum(gather_on_first(lambda: _num_bytes(owned), group)) + _total(files)
    temporary = run_on_first(lambda: _prepare(target, needed, guard), group)

    try:
        parts = gather_on_first(lambda: _write_part(temporary, rank, owned), group)
        run_on_first(lambda: _commit(about, parts, files, temporary, target, guard), group)
        run_on_first(lambda: remove_old(folder, target, keep_last), group)
    finally:
        # After the rename there is nothing of that name.
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _num_bytes(owned: Sequence[ShardedTensor]) -> int:
    return sum(box.tensor.nbytes for state in owned for box in state.boxes)


def _total(files: Mapping[str, bytes]) -> int:
    return sum(len(content) for content in files.values())


def _prepare(target: Path, needed: int, guard: Callable[[], None]) -> Path:
    """Make the temporary folder for the save ``target`` of ``needed`` bytes."""
    guard()
    folder = target.parent
    temporary = temporary_folder(target)
    with _disk_errors(target, needed):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise DiskError(f"{target}: the save needs {needed} bytes, but only {free} are free")
        if target.exists():
            if is_valid(target):
                raise CheckpointError(f"{target}: this step is saved already")
            set_aside(target)
        temporary.mkdir()
    return temporary


def _write_part(temporary: Path, rank: int, owned: Sequence[ShardedTensor]) -> _Part:
    """Write the boxes of ``owned`` as one file."""
    name = f"rank-{rank:05d}.safetensors"
    stored = [_describe(state, name) for state in owned if state.boxes]
    if not stored:
        return _Part(tensors=[], files={})
    path = temporary / name
    with _disk_errors(path, _num_bytes(owned)):
        save_file(dict(_boxes(owned)), path)
        return _Part(tensors=stored, files={name: _seal(path)})


def _describe(state: ShardedTensor, file: str) -> StoredTensor:
    boxes = (
        StoredBox(
            file=file, key=_box_key(state, index), start=box.start, shape=tuple(box.tensor.shape)
        )
        for index, box in enumerate(state.boxes)
    )
    assert state.dtype_name is not None
    return StoredTensor(state.kind, state.name, state.shape, state.dtype_name, tuple(boxes))


def _boxes(owned: Sequence[ShardedTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for state in owned:
        for index, box in enumerate(state.boxes):
            yield _box_key(state, index), box.tensor.detach().contiguous()


def _box_key(state: ShardedTensor, index: int) -> str:
    return f"{state.kind}/{state.name}/{index}"


def _commit(
    about: Manifest,
    parts: Sequence[_Part],
    files: Mapping[str, bytes],
    temporary: Path,
    target: Path,
    guard: Callable[[], None],
) -> None:
    """Add the caller's files and the manifest, and give the save its final name."""
    guard()
    with _disk_errors(temporary, _total(files)):
        written = _write_files(temporary, files)
        for part in parts:
            written |= part.files
        tensors = _merge(tensor for part in parts for tensor in part.tensors)
        manifest = replace(about, tensors=tensors, files=written)
        path = temporary / MANIFEST
        path.write_bytes(_checked(manifest, target))
        _flush(path)
        for folder, _, _ in os.walk(temporary):
            _flush(Path(folder))
        temporary.rename(target)
        _flush(target.parent)


def _checked(manifest: Manifest, target: Path) -> bytes:
    """The bytes of a manifest that a reader will accept."""
    data = encode_manifest(manifest)
    try:
        decode_manifest(data)
    except ValueError as error:
        raise CheckpointError(f"{target}: could not be opened again: {error}") from error
    return data


def _write_files(temporary: Path, files: Mapping[str, bytes]) -> dict[str, StoredFile]:
    """Write the caller's files."""
    written = {}
    for name, content in files.items():
        path = temporary / check_file_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(content)
        written[name] = _seal(path)
    return written


def _merge(parts: Iterable[StoredTensor]) -> tuple[StoredTensor, ...]:
    """Make one tensor of what the ranks have written of it."""
    by_key: defaultdict[TensorKey, list[StoredTensor]] = defaultdict(list)
    for part in parts:
        by_key[part.key].append(part)
    return tuple(_join(same) for same in by_key.values())


def _join(parts: Sequence[StoredTensor]) -> StoredTensor:
    whole = parts[0]
    for part in parts:
        if (part.shape, part.dtype) != (whole.shape, whole.dtype):
            raise CheckpointError(
                f"{part.key}: one rank saves {whole.dtype} of shape {whole.shape}, "
                f"another {part.dtype} of shape {part.shape}"
            )
    return replace(whole, boxes=tuple(box for part in parts for box in part.boxes))


def _seal(path: Path) -> StoredFile:
    """Flush and hash a file that has been written."""
    # The library makes its files for this user alone; the umask has made the folder.
    path.chmod(path.parent.stat().st_mode & 0o666)
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(_flush, path)
        stored = StoredFile(bytes=path.stat().st_size, hash=hash_file(path))
        flushed.result()
    return stored


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(path: Path, needed: int) -> Iterator[None]:
    """Raise what goes wrong in writing ``needed`` bytes to ``path`` as DiskError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DiskError(f"{path}: cannot write {needed} bytes: {reason}{_room(path)}") from error


def _room(path: Path) -> str:
    """How much is free where ``path`` should be, if that can be told."""
    try:
        return f"; {shutil.disk_usage(path.parent).free} are free"
    except OSError:
        return ""
