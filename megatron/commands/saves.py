"""``bloom verify`` and ``bloom inspect``: whether a save is as it was written, and what it holds.

bloom verify runs/bloom                                hash every file of its newest save
bloom inspect runs/bloom/checkpoints/step-00000100     what that one holds
"""

import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron.commands.arguments import CommandParser, add_run, run_of
from megatron.commands.progress import Progress, bytes_to_read
from megatron.errors import printable

if TYPE_CHECKING:
    from megatron.checkpoint.format import StoredTensor
    from megatron.checkpoint.load import CheckpointReader

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def verify(argv: Sequence[str]) -> int:
    """Hash every file of a save; return the exit code.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    reader = _open(argv, "verify", "Check that a save is as it was written, by its hashes.")
    print(f"{reader.path}: every file is as it was written")
    return 0


def inspect(argv: Sequence[str]) -> int:
    """Print what a save holds; return the exit code.

    Raises:
        CheckpointError: if it is missing, or its manifest damaged.
    """
    reader = _open(argv, "inspect", "Show the tensors, files, config and state of a save.")
    print(printable(describe(reader)))
    return 0


def _open(argv: Sequence[str], verb: str, does: str) -> "CheckpointReader":
    parser = CommandParser(
        verb, does, [f"bloom {verb} runs/mine", f"bloom {verb} runs/mine/checkpoints/step-00000100"]
    )
    add_run(parser)
    args = parser.parse(argv)
    from megatron.checkpoint.load import open_checkpoint
    from megatron.inference.load import find_checkpoint

    path = find_checkpoint(run_of(args))
    if verb == "inspect":
        return open_checkpoint(path, verify=False)
    progress = Progress(bytes_to_read(file for file in path.rglob("*") if file.is_file()))
    try:
        return open_checkpoint(path, told=progress.update)
    finally:
        progress.close()


def describe(reader: "CheckpointReader") -> str:
    """The tensors, files, config and state of a checkpoint, as text."""
    tensors = list(reader.tensors.values())
    total = sum(map(_num_bytes, tensors))
    return "\n".join(
        [
            *_table(tensors),
            f"{len(tensors)} tensors, {total} bytes",
            "",
            f"files   {', '.join(reader.files) or 'none'}",
            f"layout  {json.dumps(reader.layout)}",
            f"config  {json.dumps(reader.config, indent=2)}",
            f"state   {json.dumps(reader.state, indent=2)}",
        ]
    )


def _table(tensors: "Sequence[StoredTensor]") -> Iterator[str]:
    rows = [("kind", "name", "dtype", "shape", "boxes", "bytes")]
    for tensor in tensors:
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        boxes, size = str(len(tensor.boxes)), str(_num_bytes(tensor))
        rows.append((tensor.kind, tensor.name, tensor.dtype, shape, boxes, size))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _num_bytes(tensor: "StoredTensor") -> int:
    return math.prod(tensor.shape) * _BYTES[tensor.dtype]
