"""ShardSpec: how a parameter is cut over the tensor axis.

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
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Piece:
    """A box of the whole tensor, and where it lies in a rank's local tensor.

    Attributes:
        start: first index of the box in the whole tensor, for each dimension.
        shape: extent of the box, for each dimension.
        local_start: first index of the box in the local tensor, for each dimension.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    local_start: tuple[int, ...]

    @property
    def local_slices(self) -> tuple[slice, ...]:
        """What to index the local tensor with."""
        return tuple(
            slice(first, first + n) for first, n in zip(self.local_start, self.shape, strict=True)
        )


@dataclass(frozen=True)
class HeldBox:
    """A box of the whole tensor, and what holds it on this rank.

    Attributes:
        start: first index of the box in the whole tensor, for each dimension.
        tensor: of the shape of the box. Writing to it changes what is held.
    """

    start: tuple[int, ...]
    tensor: Tensor


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

    def pieces(self, rank: int, size: int) -> list[Piece]:
        """The boxes of the whole tensor that tensor rank ``rank`` of ``size`` holds.

        One for each block; fewer where a rank holds nothing but padding.
        """
        if self.dim is None:
            zeros = (0,) * len(self.shape)
            return [Piece(start=zeros, shape=self.shape, local_start=zeros)]
        return list(self._cut_pieces(self.dim, rank, size))

    def boxes(self, local: Tensor, rank: int, size: int) -> tuple[HeldBox, ...]:
        """The pieces of tensor rank ``rank`` of ``size``, in its tensor ``local``."""
        pieces = self.pieces(rank, size)
        return tuple(HeldBox(piece.start, local[piece.local_slices]) for piece in pieces)

    def _cut_pieces(self, dim: int, rank: int, size: int) -> Iterator[Piece]:
        block_length = self.shape[dim] // self.blocks
        run = self.run(size)
        first = rank * run
        length = min(block_length - first, run)
        if length <= 0:
            return
        for block in range(self.blocks):
            yield Piece(
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
