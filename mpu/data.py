"""Give a batch to every rank of a tensor group, of which only the first reads data.

What is wrong with a batch is found on the first rank, which tells the others in the table that they
wait for: all raise the same error, and the group stays in step.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_MAX_DIMS = 4
_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)
"""A dtype goes over as its place here, so that the order must not change within a run."""

_ALIGNMENT = 16
"""Bytes. Where a tensor begins in the buffer; that of the widest dtype."""

_NO_BATCH = -1
_FAULTS = {
    -2: "is missing",
    -3: f"has more than {_MAX_DIMS} dimensions",
    -4: "must be a plain tensor on the CPU",
    -5: f"must have one of the dtypes {', '.join(str(dtype)[6:] for dtype in _DTYPES)}",
}


def broadcast_batch(
    batch: Mapping[str, Tensor] | None,
    names: tuple[str, ...],
    *,
    group: ProcessGroup,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the first rank's ``batch``, on ``device``, on every rank of ``group``.

    Collective: the first rank of the group gives the batch, the others None. Two broadcasts: dtypes
    and shapes, and all elements in one flat buffer. They go from CPU to CPU, so that nobody waits
    for a GPU; the group needs a backend for that, such as gloo.

    Args:
        batch: tensors on the CPU, of any dtype of numbers or booleans and at most four dimensions,
            with at least the keys ``names``, which alone are sent.
        names: the keys, the same on every rank.

    Raises:
        ValueError: on every rank, if the first one gave None or something else than that.
    """
    rows = _broadcast_table(_describe(batch, names), group)
    _check(rows, names)
    dtypes = [_DTYPES[row[0]] for row in rows]
    shapes = [torch.Size(row[2 : 2 + row[1]]) for row in rows]
    if group.size() == 1:
        assert batch is not None
        return {name: copy_to_device(batch[name], device) for name in names}
    sizes = [shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    rooms = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    flat = torch.empty(sum(rooms), dtype=torch.uint8)
    if batch is not None:
        for room, name, size in zip(flat.split(rooms), names, sizes, strict=True):
            plain = batch[name].detach().resolve_conj().resolve_neg().contiguous()
            room[:size] = plain.view(-1).view(torch.uint8)
    dist.broadcast(flat, group=group, group_src=0)
    parts = copy_to_device(flat, device).split(rooms)
    return {
        name: part[:size].view(dtype).view(shape)
        for name, part, size, dtype, shape in zip(names, parts, sizes, dtypes, shapes, strict=True)
    }


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, which is on the CPU, on ``device``, without waiting for the device.

    Only memory that is pinned is read by a GPU itself. From any other the CPU copies, and first
    waits for all that the GPU was given to do.
    """
    if device.type in ("cpu", "meta"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _describe(batch: Mapping[str, Tensor] | None, names: tuple[str, ...]) -> Tensor:
    """A row for each name: dtype or what is wrong, number of dimensions, lengths."""
    table = torch.full((len(names), 2 + _MAX_DIMS), _NO_BATCH, dtype=torch.int64)
    if isinstance(batch, Mapping):
        for row, name in zip(table, names, strict=True):
            entries = _entries(batch.get(name))
            row[: len(entries)] = torch.tensor(entries)
    return table


def _entries(tensor: object) -> list[int]:
    if tensor is None:
        return [-2]
    if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.layout != torch.strided:
        return [-4]
    # One on a GPU would go by another backend than the room that the other ranks have for it.
    if tensor.device.type != "cpu":
        return [-4]
    if tensor.dim() > _MAX_DIMS:
        return [-3]
    if tensor.dtype not in _DTYPES:
        return [-5]
    return [_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]


def _broadcast_table(table: Tensor, group: ProcessGroup) -> list[list[int]]:
    if group.size() > 1:
        dist.broadcast(table, group=group, group_src=0)
    rows: list[list[int]] = table.tolist()
    return rows


def _check(rows: list[list[int]], names: tuple[str, ...]) -> None:
    for row, name in zip(rows, names, strict=True):
        if row[0] == _NO_BATCH:
            raise ValueError("the rank that reads the data has no batch")
        if row[0] < 0:
            raise ValueError(f"batch tensor {name} {_FAULTS[row[0]]}")
