"""How a parameter is cut over the ranks (ShardSpec), and what a rank holds of it (ShardedTensor).

Every parameter of a parallel model carries one. Initialisation, the gradient norm, checkpoints and
exports all read it, so that nothing else has to know, or guess from a name, what a rank holds.

Torch gives a module new parameters in many ways: ``to_empty``, ``load_state_dict(assign=True)``,
copies. The layers of this package keep the specs themselves and give them to what takes a
parameter's place. Other modules lose them, which is an error where a spec is asked for: that such a
parameter were whole on every rank would be a guess, and a wrong one makes wrong numbers.

A dimension is cut into equal runs, one for each tensor rank. A weight that stacks several matrices,
such as the two halves of a gated unit, is cut block by block, so that each rank holds the same part
of each of them. Drawn for two ranks:

    blocks=1   whole  [0 1 2 3 4 5 6 7]      rank 0  [0 1 2 3]    rank 1  [4 5 6 7]
    blocks=2   whole  [0 1 2 3|4 5 6 7]      rank 0  [0 1|4 5]    rank 1  [2 3|6 7]

If the length of the dimension does not divide, the last ranks hold padding: rows that belong to no
logical position, and that stay zero.

What a rank holds of a tensor, a weight or a moment of the optimizer, is a set of boxes of the whole
tensor. Optimizers keep parameters flat and cut them where it suits them, over tensors that are cut
over the tensor ranks themselves; that makes boxes too:

    a matrix of 3 columns     [ 0 1 2 ]        elements 2 to 8, flat,
                              [ 3 4 5 ]        are the boxes [2], [3 4 5; 6 7 8]
                              [ 6 7 8 ]

Optimizer, engines, replica check and checkpoints all speak of boxes, and know nothing of layouts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Self

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mpu.groups import Axis, ParallelGroups


@dataclass(frozen=True)
class Box:
    """A box of a whole tensor, with its values on this rank.

    Attributes:
        start: first index of the box in the whole tensor, for each dimension.
        tensor: the values, of the shape of the box. Writing to it changes what the rank holds.
    """

    start: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True)
class ShardedTensor:
    """What this rank holds of one tensor of the training state.

    Attributes:
        kind: "weight", "exp_avg" or "exp_avg_sq".
        name: of the parameter that it belongs to.
        shape: of the whole tensor.
        boxes: what this rank holds, none of it empty, in no order; there may be none.
        owned: whether this rank saves the boxes; of the ranks that hold equal ones, one does.
        replicated_over: axes of the rank grid along which all ranks hold equal boxes; along
            embedding, the same together with their data ranks.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    owned: bool
    replicated_over: tuple[Axis, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the tensor in a training state."""
        return self.kind, self.name

    @property
    def dtype_name(self) -> str | None:
        """As in "float32"; None where nothing is held."""
        return str(self.boxes[0].tensor.dtype).removeprefix("torch.") if self.boxes else None


class _Cut(NamedTuple):
    """A box of the whole tensor, and where it begins in a rank's local tensor."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    local_start: tuple[int, ...]


@dataclass(frozen=True)
class ShardSpec:
    """How one parameter is cut over the tensor axis.

    Attributes:
        shape: shape of the whole, logical parameter.
        dim: the dimension that is cut, or None if every rank holds all of it.
        blocks: number of stacked matrices that are cut one by one.
        padded_run: local length of each block along ``dim`` where it is longer than an even cut
            needs; None where it is not.
        sum_gradient: a replicated parameter of which each tensor rank sees only its part of the
            sequence, so that the ranks' gradients are parts of a sum.
        tied: the first and the last pipeline stage hold a copy each, whose gradients are parts of
            a sum.
        tied_copy: the one of them that is not counted, saved and exported.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    blocks: int = 1
    padded_run: int | None = None
    sum_gradient: bool = False
    tied: bool = False
    tied_copy: bool = False

    def run(self, size: int) -> int:
        """Local length of one block along ``dim``, over ``size`` tensor ranks."""
        assert self.dim is not None
        even = -(-self.shape[self.dim] // self.blocks // size)
        return self.padded_run if self.padded_run is not None else even

    def local_shape(self, size: int) -> tuple[int, ...]:
        """Shape of each rank's tensor, over ``size`` tensor ranks."""
        if self.dim is None:
            return self.shape
        before, after = self.shape[: self.dim], self.shape[self.dim + 1 :]
        return (*before, self.blocks * self.run(size), *after)

    def boxes(self, local: Tensor, rank: int, size: int) -> tuple[Box, ...]:
        """The boxes of tensor rank ``rank`` of ``size``, in its tensor ``local``.

        One for each block; fewer where a rank holds nothing but padding.
        """
        origin = (0,) * local.dim()
        return tuple(
            box for cut in self._cuts(rank, size) for box in _intersect(origin, local, cut)
        )

    def flat_boxes(self, start: int, flat: Tensor, rank: int, size: int) -> Iterator[Box]:
        """The boxes in ``flat``: some of the elements of the flattened local tensor of one or two
        dimensions, from element ``start`` on."""
        for box_start, box in _unflatten(self.local_shape(size), start, flat):
            for cut in self._cuts(rank, size):
                yield from _intersect(box_start, box, cut)

    def is_main_replica(self, groups: ParallelGroups) -> bool:
        """Whether this rank's part counts for the norm, and is saved.

        Each element of the whole tensor does on one rank of the model: of a replicated parameter on
        the first tensor rank, of a tied one on the first stage. What the data ranks hold is another
        question.
        """
        return not self.tied_copy and (self.dim is not None or groups.tensor.rank() == 0)

    def sharded_tensor(
        self,
        kind: str,
        name: str,
        boxes: Iterable[Box],
        groups: ParallelGroups,
        *,
        cut_over_data: bool,
    ) -> ShardedTensor:
        """What this rank holds of a tensor that is cut as this parameter.

        Args:
            boxes: what this rank holds.
            cut_over_data: the data ranks hold a part each; otherwise they all hold the same.
        """
        replicated_over: list[Axis] = []
        if self.dim is None:
            replicated_over.append("tensor")
        if not cut_over_data:
            replicated_over.append("data")
        if self.tied:
            replicated_over.append("embedding")
        owned = (cut_over_data or groups.data.rank() == 0) and self.is_main_replica(groups)
        return ShardedTensor(kind, name, self.shape, tuple(boxes), owned, tuple(replicated_over))

    def _cuts(self, rank: int, size: int) -> Iterator[_Cut]:
        if self.dim is None:
            zeros = (0,) * len(self.shape)
            yield _Cut(start=zeros, shape=self.shape, local_start=zeros)
            return
        dim = self.dim
        block_length = self.shape[dim] // self.blocks
        run = self.run(size)
        first = rank * run
        length = min(block_length - first, run)
        if length <= 0:
            return
        for block in range(self.blocks):
            yield _Cut(
                start=self._at(dim, block * block_length + first),
                shape=(*self.shape[:dim], length, *self.shape[dim + 1 :]),
                local_start=self._at(dim, block * run),
            )

    def _at(self, dim: int, index: int) -> tuple[int, ...]:
        return tuple(index if d == dim else 0 for d in range(len(self.shape)))


def set_shard_spec(parameter: nn.Parameter, spec: ShardSpec) -> None:
    """Attach ``spec`` to ``parameter``."""
    parameter.shard_spec = spec  # type: ignore[attr-defined]


def mark_whole(module: nn.Module, *, sum_gradient: bool = False) -> None:
    """Say of an ordinary ``module`` that every rank holds all of its parameters."""
    for parameter in module.parameters():
        spec = ShardSpec(shape=tuple(parameter.shape), sum_gradient=sum_gradient)
        set_shard_spec(parameter, spec)


def shard_spec(parameter: nn.Parameter) -> ShardSpec:
    """The spec of ``parameter``.

    Raises:
        ValueError: if it carries none, because it never got one or took the place of one that did.
    """
    spec = _carried(parameter)
    if spec is None:
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} carries no ShardSpec: it never got "
            "one, or took the place of one that did (Module.to_empty, load_state_dict with "
            "assign=True, copy.deepcopy); give it one by set_shard_spec, or by mark_whole if "
            "every rank holds all of it"
        )
    return spec


class ShardedModule(nn.Module):
    """A module whose parameters keep their specs, whatever torch puts in their place."""

    def __init__(self) -> None:
        super().__init__()
        self._shard_specs: dict[str, ShardSpec] = {}

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Before, too: a spec may have been changed since it was noted.
        self._keep_specs()
        super().register_parameter(name, param)
        self._keep_specs()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._keep_specs()
        module = super()._apply(*args, **kwargs)
        self._keep_specs()
        return module

    def __getstate__(self) -> dict[str, Any]:
        self._keep_specs()
        return self.__dict__.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Groups are of the process: a copy, as for an average of weights, exchanges over the same.
        memo |= {id(it): it for it in vars(self).values() if isinstance(it, ProcessGroup)}
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(deepcopy(self.__getstate__(), memo))
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_specs()

    def _keep_specs(self) -> None:
        """Note the specs that parameters carry, and give theirs to those that carry none."""
        for name, parameter in self._parameters.items():
            if parameter is None:
                continue
            spec = _carried(parameter)
            if spec is not None:
                self._shard_specs[name] = spec
            elif name in self._shard_specs:
                set_shard_spec(parameter, self._shard_specs[name])


def _carried(parameter: nn.Parameter) -> ShardSpec | None:
    spec: ShardSpec | None = getattr(parameter, "shard_spec", None)
    return spec


def replace_parameters(
    module: nn.Module, tensor_for: Callable[[str, nn.Parameter], Tensor]
) -> None:
    """Give each parameter the storage that ``tensor_for`` returns for its name and old self."""
    for path, part in module.named_modules():
        for name, old in list(part.named_parameters(recurse=False)):
            new = nn.Parameter(tensor_for(f"{path}.{name}" if path else name, old))
            spec = _carried(old)
            if spec is not None:
                set_shard_spec(new, spec)
            part.register_parameter(name, new)


def _unflatten(
    shape: Sequence[int], start: int, flat: Tensor
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Boxes, with their starts, of elements from ``start`` on of a flattened tensor of ``shape``.

    Those are the end of a row, whole rows, and the beginning of a row.
    """
    width = prod(shape[1:])
    stop = start + flat.numel()
    head_stop = min(stop, -(-start // width) * width)
    body_stop = max(head_stop, stop // width * width)
    for first, last in ((start, head_stop), (head_stop, body_stop), (body_stop, stop)):
        if first == last:
            continue
        part = flat[first - start : last - start]
        if len(shape) == 1:
            yield (first,), part
        else:
            row, column = divmod(first, width)
            yield (row, column), part.view(-1, min(width, last - first))


def _intersect(start: tuple[int, ...], box: Tensor, cut: _Cut) -> Iterator[Box]:
    """The part of a box of the local tensor that lies in ``cut``, if there is one."""
    ends = [a + n for a, n in zip(start, box.shape, strict=True)]
    firsts = [max(a, b) for a, b in zip(start, cut.local_start, strict=True)]
    lasts = [min(end, b + n) for end, b, n in zip(ends, cut.local_start, cut.shape, strict=True)]
    if any(first >= last for first, last in zip(firsts, lasts, strict=True)):
        return
    inside = tuple(
        slice(first - a, last - a) for first, last, a in zip(firsts, lasts, start, strict=True)
    )
    whole_start = tuple(
        first - b + whole
        for first, b, whole in zip(firsts, cut.local_start, cut.start, strict=True)
    )
    yield Box(whole_start, box[inside])
