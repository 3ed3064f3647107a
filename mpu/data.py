"""Give a batch to every rank of a tensor group, of which only the first reads data."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_MAX_DIMS = 4


def broadcast_batch(
    batch: dict[str, Tensor] | None,
    names: tuple[str, ...],
    *,
    group: ProcessGroup,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the first rank's ``batch``, on ``device``, on every rank of ``group``.

    Collective: the first rank of the group gives the batch, the others None. Two broadcasts: the
    shapes, and all elements in one flat buffer. They go from CPU to CPU, so that nobody waits for a
    GPU; the group needs a backend for that, such as gloo.

    Args:
        batch: int64 tensors of at most four dimensions, with exactly the keys ``names``.
        names: the keys, the same on every rank.

    Raises:
        ValueError: on every rank, if the first one gave None: it has no batch.
    """
    if group.size() == 1:
        if batch is None:
            raise ValueError("the rank that reads the data has no batch")
        return {name: batch[name].to(device, non_blocking=True) for name in names}
    source = dist.get_process_group_ranks(group)[0]
    shapes = _broadcast_shapes(batch, names, source, group)
    sizes = [shape.numel() for shape in shapes]
    if batch is None:
        flat = torch.empty(sum(sizes), dtype=torch.int64)
    else:
        flat = torch.cat([batch[name].flatten() for name in names])
    dist.broadcast(flat, src=source, group=group)
    parts = flat.to(device, non_blocking=True).split(sizes)
    return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}


def _broadcast_shapes(
    batch: dict[str, Tensor] | None,
    names: tuple[str, ...],
    source: int,
    group: ProcessGroup,
) -> list[torch.Size]:
    """The shapes of the batch on every rank; the table is (dimensions, lengths...) a row."""
    table = torch.full((len(names), 1 + _MAX_DIMS), -1, dtype=torch.int64)
    if batch is not None:
        for row, name in zip(table, names, strict=True):
            shape = _check_tensor(name, batch[name]).shape
            row[: 1 + len(shape)] = torch.tensor([len(shape), *shape])
    dist.broadcast(table, src=source, group=group)
    rows = table.tolist()
    if any(row[0] < 0 for row in rows):
        raise ValueError("the rank that reads the data has no batch")
    return [torch.Size(row[1 : 1 + row[0]]) for row in rows]


def _check_tensor(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.int64 or tensor.dim() > _MAX_DIMS:
        raise ValueError(
            f"batch tensor {name} must be int64 of at most {_MAX_DIMS} dimensions, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    return tensor
