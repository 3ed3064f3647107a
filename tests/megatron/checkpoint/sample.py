"""A small state that is cut in every way a model is, for the tests of this folder."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias
from zlib import crc32

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.checkpoint.format import MANIFEST, TensorKey
from megatron.checkpoint.save import save_checkpoint
from mpu import ShardedTensor
from mpu.sharding import ShardSpec
from tests.shards import region

LocalTensors: TypeAlias = dict[TensorKey, torch.Tensor]
"""By kind and name, what one rank holds, with its padding."""

# Not the value of any element.
PADDING = -7.0

DTYPES = {"weight": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.float64}
FILES = {"tokenizer/tokenizer.json": b'{"model": {}}', "notes.txt": b""}


def specs(size: int) -> dict[str, ShardSpec]:
    """By name, every way to cut a parameter over ``size`` ranks."""
    return {
        "column": ShardSpec((8, 6), dim=0),
        "row": ShardSpec((6, 8), dim=1),
        "gated": ShardSpec((16, 3), dim=0, blocks=2),
        # With 4 ranks, the last two hold nothing but padding.
        "vocabulary": ShardSpec((13, 5), dim=0, padded_run=16 if size == 1 else 8),
        "norm": ShardSpec((6,)),
        "scale": ShardSpec(()),
    }


def whole(kind: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The logical tensor that every layout cuts."""
    generator = torch.Generator().manual_seed(crc32(f"{kind}/{name}".encode()))
    return torch.rand(shape, generator=generator).to(DTYPES[kind])


def local_tensors(rank: int, size: int, *, filled: bool) -> LocalTensors:
    """The tensors of ``rank`` of ``size``; with nothing but PADDING if not ``filled``."""
    tensors = {}
    for kind, dtype in DTYPES.items():
        for name, spec in specs(size).items():
            local = torch.full(spec.local_shape(size), PADDING, dtype=dtype)
            for box in spec.boxes(local, rank, size) if filled else ():
                box.tensor.copy_(whole(kind, name, spec.shape)[region(box)])
            tensors[kind, name] = local
    return tensors


def states_of(tensors: LocalTensors, rank: int, size: int) -> list[ShardedTensor]:
    """What ``rank`` of ``size`` holds in its ``tensors``."""
    states = []
    for (kind, name), local in tensors.items():
        spec = specs(size)[name]
        owned = spec.dim is not None or rank == 0
        boxes = spec.boxes(local, rank, size)
        states.append(ShardedTensor(kind, name, spec.shape, boxes, owned))
    return states


def local_state(rank: int, size: int, *, filled: bool) -> list[ShardedTensor]:
    """What ``rank`` of ``size`` holds; nothing but PADDING if not ``filled``."""
    return states_of(local_tensors(rank, size, filled=filled), rank, size)


def world() -> ProcessGroup | None:
    """The group of all ranks; None in a process that is alone."""
    return dist.group.WORLD if dist.is_initialized() else None


def save(folder: Path, step: int = 100, keep_last: int = 0) -> Path:
    """Save the sample state of this rank."""
    group = world()
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    return save_checkpoint(
        folder,
        step,
        local_state(rank, size, filled=True),
        state={"step": step, "consumed_samples": 8 * step},
        config={"model": {"num_layers": 2, "init_std": None}},
        layout={"tensor": size},
        files=FILES,
        group=group,
        keep_last=keep_last,
    )


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of the manifest of the save ``path``."""
    return json.loads((path / MANIFEST).read_bytes())


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Apply ``edit`` to the manifest of the save ``path``, and make its own hash fit again."""
    fields = read_fields(path)
    del fields["hash"]
    edit(fields)
    sign_manifest(path, json.dumps(fields))


def sign_manifest(path: Path, text: str) -> None:
    """Write the JSON object ``text`` as manifest of the save ``path``, with a hash that fits."""
    body = text.removeprefix("{").encode()
    digest = hashlib.sha256(body).hexdigest().encode()
    (path / MANIFEST).write_bytes(b'{"hash":"' + digest + b'",' + body)


def names(folder: Path) -> list[str]:
    """What lies in ``folder``, hidden things too."""
    return sorted(path.name for path in folder.iterdir())
