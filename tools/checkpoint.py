"""Look into a checkpoint, or verify that it is as it was written.

    python tools/checkpoint.py inspect runs/bloom/step-00000100     what it holds
    python tools/checkpoint.py verify  runs/bloom/step-00000100     hash every file

Exit code 0, or 4 if the checkpoint is missing or damaged.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron.checkpoint.format import StoredTensor
from megatron.checkpoint.load import CheckpointReader, open_checkpoint
from megatron.errors import RunError, printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    parser = argparse.ArgumentParser(description="Look into a checkpoint, or verify it.")
    parser.add_argument("command", choices=["inspect", "verify"])
    parser.add_argument("folder", type=Path, help="a step-NNNNNNNN folder")
    arguments = parser.parse_args(argv)
    verify = arguments.command == "verify"
    try:
        reader = open_checkpoint(arguments.folder, verify=verify)
    except RunError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(
        f"{reader.path}: every file is as it was written" if verify else printable(describe(reader))
    )
    return 0


def describe(reader: CheckpointReader) -> str:
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


def _table(tensors: Sequence[StoredTensor]) -> Iterator[str]:
    rows = [("kind", "name", "dtype", "shape", "boxes", "bytes")]
    for tensor in tensors:
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        boxes, size = str(len(tensor.boxes)), str(_num_bytes(tensor))
        rows.append((tensor.kind, tensor.name, tensor.dtype, shape, boxes, size))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _num_bytes(tensor: StoredTensor) -> int:
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return math.prod(tensor.shape) * dtype.itemsize


if __name__ == "__main__":
    sys.exit(main())
