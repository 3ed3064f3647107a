"""What every keeper of parameters has to do, checked on parameters that are cut in every way.

The whole of each parameter and its gradients are known, in whole numbers that any order of summing
gives exactly. Every rank computes with its part; what all ranks hold must make up the whole again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from zlib import crc32

import torch
from torch import Tensor, nn

from megatron.optim.parameters import Parameters
from mpu import (
    ParallelDims,
    ParallelGroups,
    ShardedTensor,
    ShardSpec,
    build_groups,
    set_shard_spec,
    shard_spec,
)
from tests.shards import cut, region

CPU = torch.device("cpu")
Make: TypeAlias = Callable[["Stage", ParallelGroups], Parameters]
"""Builds the keeper of a stage on the meta device."""


def specs(tensor: int) -> dict[str, ShardSpec]:
    """By name, every kind of parameter, of odd sizes, over ``tensor`` ranks."""
    return {
        "column.weight": ShardSpec((12, 25), dim=0),
        "row.weight": ShardSpec((3, 100), dim=1),
        "gated.weight": ShardSpec((16, 27), dim=0, blocks=2),
        "vocabulary.weight": ShardSpec((13, 25), dim=0, padded_run=16 // tensor),
        "positions.weight": ShardSpec((3, 5), sum_gradient=True),
        "column.bias": ShardSpec((12,), dim=0),
        "norm.weight": ShardSpec((5,), sum_gradient=True),
        "row.bias": ShardSpec((1,)),
    }


TIED = "tied.weight"


class Stage(nn.Module):
    """A stage whose loss has any gradient that is asked for.

    Attributes:
        computed_with: the parameters as the last forward pass saw them.
    """

    def __init__(self, groups: ParallelGroups, dtype: torch.dtype) -> None:
        super().__init__()
        size = groups.tensor.size()
        self.specs = specs(size)
        if groups.pipeline.size() > 1:
            is_last = groups.pipeline.rank() > 0
            # Stages hold other parameters, but for the one that they share.
            half = slice(0, None, 2) if is_last else slice(1, None, 2)
            self.specs = dict(list(self.specs.items())[half])
            self.specs[TIED] = ShardSpec((8, 5), dim=0, tied=True, tied_copy=is_last)
        for name, spec in self.specs.items():
            module, kind = name.split(".")
            if not hasattr(self, module):
                self.add_module(module, nn.Module())
            shape = spec.local_shape(size)
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
            set_shard_spec(parameter, spec)
            self.get_submodule(module).register_parameter(kind, parameter)
        self.computed_with: dict[str, Tensor] = {}

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        """A loss of which ``gradients`` are the gradients."""
        named = dict(self.named_parameters())
        self.computed_with = {name: p.detach().double().clone() for name, p in named.items()}
        return torch.stack([(named[name] * gradients[name]).sum() for name in self.specs]).sum()


def whole_value(name: str, shape: Sequence[int], what: str = "value") -> Tensor:
    """Small whole numbers, none of them zero."""
    generator = torch.Generator().manual_seed(crc32(f"{what} of {name}".encode()))
    return torch.randint(1, 100, tuple(shape), generator=generator).double()


@dataclass(frozen=True)
class Kept:
    """What one rank holds: by what it is, of all its parameters; and the norm of the gradient."""

    held: dict[str, list[ShardedTensor]]
    norm: float
    specs: dict[str, ShardSpec]


def keep(dims: ParallelDims, make: Make, dtype: torch.dtype) -> Kept:
    """One step on this rank, in which the main parameters grow by one. Body of ``run_ranks``."""
    groups = build_groups(dims)
    stage = Stage(groups, dtype)
    parameters = make(stage, groups)
    fill_in(parameters, groups)
    held = {"value": copies(parameters, lambda main: main)}
    parameters.zero_gradients()
    for microbatch in range(2):
        stage(_gradients(stage, groups, microbatch)).backward()
    parameters.reduce_gradients()
    held["gradient"] = copies(parameters, _gradient)
    norm = parameters.gradient_norm().item()
    parameters.scale_gradients(torch.tensor(0.5))
    held["half of the gradient"] = copies(parameters, _gradient)
    with torch.no_grad():
        for group, sign in zip(parameters.main(), (1, -1), strict=True):
            for main in group:
                main.add_(sign)
    parameters.sync_weights()
    held["updated"] = copies(parameters, lambda main: main)
    stage(_gradients(stage, groups, 0))
    check_weights(stage, groups)
    return Kept(held, norm, stage.specs)


def fill_in(parameters: Parameters, groups: ParallelGroups) -> None:
    """Give every parameter its whole numbers."""

    def fill(name: str, parameter: nn.Parameter) -> None:
        spec = shard_spec(parameter)
        part = cut(whole_value(name, spec.shape), spec, groups.tensor.rank(), groups.tensor.size())
        parameter.detach().copy_(part)

    parameters.initialise(fill)


def copies(parameters: Parameters, of: Callable[[nn.Parameter], Tensor]) -> list[ShardedTensor]:
    """What is held now, as float64."""
    return list(parameters.state("weight", lambda main: of(main).detach().double().clone()))


def _gradient(main: nn.Parameter) -> Tensor:
    assert main.grad is not None
    return main.grad


def _gradients(stage: Stage, groups: ParallelGroups, microbatch: int) -> dict[str, Tensor]:
    """This rank's parts of the gradients of a microbatch."""
    tensor = groups.tensor
    found = {}
    for name, spec in stage.specs.items():
        # Only ranks of which the gradients are parts of a sum have gradients of their own.
        parts = [tensor.rank()] if spec.sum_gradient else [0]
        parts += [groups.pipeline.rank()] if spec.tied else [0]
        what = f"gradient {microbatch} {groups.data.rank()} {parts}"
        found[name] = cut(whole_value(name, spec.shape, what), spec, tensor.rank(), tensor.size())
        dtype = dict(stage.named_parameters())[name].dtype
        found[name] = found[name].to(dtype)
    return found


def whole_gradient(name: str, spec: ShardSpec, dims: ParallelDims) -> Tensor:
    """The sum over microbatches, data ranks, and the ranks that have parts of it."""
    parts = [
        [tensor, pipeline]
        for tensor in range(dims.tensor if spec.sum_gradient else 1)
        for pipeline in range(dims.pipeline if spec.tied else 1)
    ]
    values = [
        whole_value(name, spec.shape, f"gradient {microbatch} {data} {part}")
        for microbatch in range(2)
        for data in range(dims.data)
        for part in parts
    ]
    return torch.stack(values).sum(dim=0)


def _updated(name: str, spec: ShardSpec) -> Tensor:
    """Decayed parameters have grown, the others shrunk, by one."""
    return whole_value(name, spec.shape) + (1 if len(spec.shape) > 1 else -1)


def check_weights(stage: Stage, groups: ParallelGroups) -> None:
    """Whether the last forward pass has seen the updated parameters."""
    for name, spec in stage.specs.items():
        want = _updated(name, spec)
        got = stage.computed_with[name]
        for box in spec.boxes(got, groups.tensor.rank(), groups.tensor.size()):
            assert torch.equal(box.tensor, want[region(box)]), name


def check_kept(ranks: Sequence[Kept], dims: ParallelDims, norm_error: float = 1e-15) -> None:
    """Everything that all ranks hold is right, and each element is saved by one of them."""
    want: dict[str, Callable[[str, ShardSpec], Tensor]] = {
        "value": lambda name, spec: whole_value(name, spec.shape),
        "gradient": lambda name, spec: whole_gradient(name, spec, dims),
        "half of the gradient": lambda name, spec: whole_gradient(name, spec, dims) / 2,
        "updated": _updated,
    }
    of_all = {name: spec for rank in ranks for name, spec in rank.specs.items()}
    for what, whole in want.items():
        check_boxes([rank.held[what] for rank in ranks], whole, of_all)
    squares = {
        name: whole_gradient(name, spec, dims).square().sum().item()
        for name, spec in of_all.items()
    }
    assert len(squares) == len(specs(dims.tensor)) + (dims.pipeline > 1)
    assert len({rank.norm for rank in ranks}) == 1
    want_norm = sum(squares.values()) ** 0.5
    torch.testing.assert_close(ranks[0].norm, want_norm, rtol=norm_error, atol=0)


def check_boxes(
    ranks: Sequence[Sequence[ShardedTensor]],
    whole: Callable[[str, ShardSpec], Tensor],
    of_all: Mapping[str, ShardSpec],
) -> None:
    """All boxes hold the right numbers, and those that are owned tile every tensor."""
    times_owned: dict[str, Tensor] = {}
    for held in (held for rank in ranks for held in rank):
        want = whole(held.name, of_all[held.name])
        times = times_owned.setdefault(held.name, torch.zeros(held.shape))
        for part in held.boxes:
            torch.testing.assert_close(
                part.tensor, want[region(part)], rtol=1e-15, atol=0, msg=held.name
            )
            times[region(part)] += held.owned
    for name, times in times_owned.items():
        assert bool((times == 1).all()), f"{name}: {times}"


def num_elements(held: Sequence[ShardedTensor]) -> int:
    """In all boxes of a rank."""
    return sum(part.tensor.numel() for entry in held for part in entry.boxes)
