"""Open a save, refuse it if anything is wrong with it, and read it at any layout.

Opening comes first, and nothing is used before it is through. The files are shared out over the
ranks to be verified, and all ranks share the verdict.

Reading intersects boxes. What a rank wants and what a file holds are boxes of the same whole
tensor, cut by two layouts that need not know of each other:

    saved by two ranks     [ rank 0       | rank 1       ]
    read by three          [ 0       | 1       | 2       ]     rank 1 reads a part of both files
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed import ProcessGroup

from megatron.checkpoint.folders import find_fault, step_folders
from megatron.checkpoint.format import (
    Manifest,
    StoredBox,
    StoredTensor,
    TensorKey,
    find_member,
    read_manifest,
)
from megatron.checkpoint.verify import find_damages
from megatron.errors import CheckpointError
from megatron.together import gather_on_first, run_everywhere, run_on_first, run_together
from mpu.sharding import Box, ShardedTensor

# So many names are listed where tensors are missing or unexpected.
NUM_NAMES = 5

Slices: TypeAlias = tuple[slice, ...]


@dataclass(frozen=True)
class _Copy:
    """Copy a region of a tensor in a file to a region of a local tensor."""

    key: str
    source: Slices
    target: torch.Tensor


def open_checkpoint(
    path: Path,
    *,
    group: ProcessGroup | None = None,
    verify: bool = True,
    told: Callable[[int], None] | None = None,
) -> "CheckpointReader":
    """Open the save ``path`` after checking all of it.

    Collective over ``group``; None if this process is alone. Without ``verify`` the sizes of the
    files and the tensors in them are checked, but not their hashes.

    Args:
        told: called after each file with the bytes that this rank has checked.

    Raises:
        CheckpointError: on every rank, if the save is missing, damaged or contradicts itself.
    """
    manifest = run_on_first(lambda: _read_manifest(path), group)
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    # The largest first, so that the ranks get about as much each.
    names = sorted(manifest.files, key=lambda name: manifest.files[name].bytes, reverse=True)
    mine: Iterable[str] = names[rank::size]
    if told is not None:
        mine = _telling(mine, manifest, told)
    damages = run_together(lambda: find_damages(path, manifest, mine, verify), group)
    found = [damage for damages_of_rank in damages for damage in damages_of_rank]
    if found:
        others = f" (other damaged files: {len(found) - 1})" if len(found) > 1 else ""
        raise CheckpointError(found[0] + others, on_every_rank=True)
    return CheckpointReader(path, manifest, group)


def _telling(
    names: Iterable[str], manifest: Manifest, told: Callable[[int], None]
) -> Iterator[str]:
    """``names``, whose bytes are counted and told when the next one is asked for."""
    checked = 0
    for name in names:
        yield name
        checked += manifest.files[name].bytes
        told(checked)


class CheckpointReader:
    """A save that has been checked.

    Attributes:
        path: its folder.
        state: what the run needs to go on.
        config: the configuration of the run that wrote it.
        layout: the rank grid that wrote it.
        tensors: by (kind, name), what is stored of each tensor.
        files: names of the files that the saving run has kept with it.
    """

    def __init__(self, path: Path, manifest: Manifest, group: ProcessGroup | None) -> None:
        self.path = path
        self.state: Mapping[str, Any] = manifest.state
        self.config: Mapping[str, Any] = manifest.config
        self.layout: Mapping[str, Any] = manifest.layout
        self.tensors: Mapping[TensorKey, StoredTensor] = {
            tensor.key: tensor for tensor in manifest.tensors
        }
        tensor_files = {box.file for tensor in manifest.tensors for box in tensor.boxes}
        self.files = tuple(name for name in manifest.files if name not in tensor_files)
        self._group = group

    def file(self, name: str) -> bytes:
        """Contents of one of ``files``.

        Raises:
            CheckpointError: if the save holds no such file, or it cannot be read.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.path}: holds no file {name!r}, only {list(self.files)}")
        try:
            return find_member(self.path, name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self.path / name}: cannot be read: {error}") from error

    def read(self, kind: str, name: str) -> torch.Tensor:
        """One whole tensor, on the CPU. Not collective.

        Raises:
            CheckpointError: if the save holds no such tensor.
        """
        stored = self.tensors.get((kind, name))
        if stored is None:
            raise CheckpointError(f"{self.path}: holds no {kind} of {name!r}")
        tensor = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
        whole = Box((0,) * len(stored.shape), tensor)
        self._fill([ShardedTensor(kind, name, stored.shape, (whole,), owned=True)])
        return tensor

    def read_into(self, targets: Iterable[ShardedTensor]) -> None:
        """Fill the boxes of every target, from whatever layout saved them.

        Collective over the group that the save was opened with. The ranks' targets together must be
        exactly the tensors of the save, of equal shapes and dtypes.

        Raises:
            CheckpointError: on every rank, naming the tensors that differ; nothing has been read.
        """
        self._read(list(targets), set(self.tensors), exact=True)

    def read_weights_into(self, targets: Iterable[ShardedTensor]) -> None:
        """Fill the weights of a model as ``read_into`` does, and leave the optimizer's state alone.

        Collective like it. The values are rounded to the dtype of the target.

        Raises:
            CheckpointError: on every rank, naming the weights that differ; nothing has been read.
        """
        weights = {key for key in self.tensors if key[0] == "weight"}
        self._read(list(targets), weights, exact=False)

    def _read(
        self, targets: Sequence[ShardedTensor], stored: set[TensorKey], *, exact: bool
    ) -> None:
        """Fill ``targets``, which must be ``stored``; with equal dtypes if ``exact``."""
        keys = gather_on_first(lambda: self._check_targets(targets, exact), self._group)
        run_on_first(lambda: self._check_names(set().union(*keys), stored), self._group)
        run_everywhere(lambda: self._fill(targets), self._group)

    def _check_targets(self, targets: Sequence[ShardedTensor], exact: bool) -> set[TensorKey]:
        for target in targets:
            stored = self.tensors.get(target.key)
            if stored is None:
                continue
            same_dtype = target.dtype_name in (stored.dtype, None) or not exact
            if target.shape != stored.shape or not same_dtype:
                raise CheckpointError(
                    f"{self.path}: {target.kind} of {target.name} is {stored.dtype} of shape "
                    f"{stored.shape}, but the model's is {target.dtype_name} of shape "
                    f"{target.shape}"
                )
        return {target.key for target in targets}

    def _check_names(self, wanted: set[TensorKey], stored: set[TensorKey]) -> None:
        if wanted != stored:
            raise CheckpointError(
                f"{self.path}: is of another model. Missing in the checkpoint: "
                f"{_some(wanted - stored)}\nMissing in the model: {_some(stored - wanted)}"
            )

    def _fill(self, targets: Iterable[ShardedTensor]) -> None:
        copies: defaultdict[str, list[_Copy]] = defaultdict(list)
        for target in targets:
            for box in self.tensors[target.key].boxes:
                copies[box.file] += _copies(box, target)
        for name, of_file in copies.items():
            path = find_member(self.path, name)
            try:
                _run_copies(path, of_file)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _run_copies(path: Path, copies: Iterable[_Copy]) -> None:
    with safe_open(path, framework="pt") as file:
        for copy in copies:
            copy.target.copy_(file.get_slice(copy.key)[copy.source])


def _copies(box: StoredBox, target: ShardedTensor) -> list[_Copy]:
    """What to copy from ``box`` to the boxes of ``target``."""
    copies = []
    for held in target.boxes:
        first = [max(a, b) for a, b in zip(box.start, held.start, strict=True)]
        last = [
            min(a + n, b + m)
            for a, n, b, m in zip(box.start, box.shape, held.start, held.tensor.shape, strict=True)
        ]
        if all(a < b for a, b in zip(first, last, strict=True)):
            into = held.tensor.detach()[_slices(first, last, held.start)]
            copies.append(_Copy(box.key, _slices(first, last, box.start), into))
    return copies


def _slices(first: Sequence[int], last: Sequence[int], origin: Sequence[int]) -> Slices:
    """The region from ``first`` to ``last``, seen from ``origin``."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(first, last, origin, strict=True))


def _read_manifest(path: Path) -> Manifest:
    try:
        return read_manifest(path)
    except CheckpointError as error:
        others = [other for _, other in step_folders(path.parent) if other.name != path.name]
        names = ", ".join(other.name for other in others if find_fault(other) is None) or "none"
        raise CheckpointError(f"{error}\nvalid checkpoints in {path.parent}: {names}") from error


def _some(keys: set[TensorKey]) -> str:
    names = sorted(f"{kind} of {name}" for kind, name in keys)
    rest = f" and {len(names) - NUM_NAMES} more" if len(names) > NUM_NAMES else ""
    return ", ".join(names[:NUM_NAMES]) + rest if names else "nothing"
