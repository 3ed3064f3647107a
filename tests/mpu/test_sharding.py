"""The boxes of a ShardSpec: every element of the whole is held once, where it should be."""

import copy
import pickle
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.utils import parametrize

from mpu import (
    ColumnParallelLinear,
    ParallelDims,
    RowParallelLinear,
    ShardSpec,
    VocabParallelEmbedding,
    build_groups,
    init_normal,
    mark_whole,
    replace_parameters,
    set_shard_spec,
    shard_spec,
)
from mpu.sharding import ShardedModule
from tests.distributed import run_ranks
from tests.shards import cut, join, region


def random_spec(numbers: random.Random) -> ShardSpec:
    """A spec of one to three dimensions, in one to three blocks, that need not divide."""
    num_dims = numbers.randint(1, 3)
    dim = numbers.randrange(num_dims)
    blocks = numbers.randint(1, 3)
    shape = [numbers.randint(1, 5) for _ in range(num_dims)]
    shape[dim] = blocks * numbers.randint(1, 12)
    return ShardSpec(shape=tuple(shape), dim=dim, blocks=blocks)


@pytest.mark.parametrize("seed", range(50))
def test_boxes_tile_the_whole_exactly(seed: int) -> None:
    numbers = random.Random(seed)
    spec, size = random_spec(numbers), numbers.randint(1, 6)
    held = torch.zeros(spec.shape, dtype=torch.int64)
    for rank in range(size):
        local = torch.zeros(spec.local_shape(size), dtype=torch.int64)
        for box in spec.boxes(local, rank, size):
            assert box.tensor.shape == held[region(box)].shape
            held[region(box)] += 1
            box.tensor.add_(1)
        assert local.max() <= 1, "two boxes lie in the same place"
    assert (held == 1).all()


@pytest.mark.parametrize("seed", range(50))
def test_whole_is_the_same_after_cut_and_join(seed: int) -> None:
    numbers = random.Random(seed)
    spec, size = random_spec(numbers), numbers.randint(1, 6)
    whole = torch.randn(spec.shape)
    assert torch.equal(join([cut(whole, spec, rank, size) for rank in range(size)], spec), whole)


def test_blocks_are_cut_one_by_one() -> None:
    whole = torch.arange(8)
    plain, stacked = ShardSpec(shape=(8,), dim=0), ShardSpec(shape=(8,), dim=0, blocks=2)
    assert [cut(whole, plain, rank, 2).tolist() for rank in range(2)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    assert [cut(whole, stacked, rank, 2).tolist() for rank in range(2)] == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
    ]


def test_last_ranks_hold_padding() -> None:
    spec = ShardSpec(shape=(509, 4), dim=0, padded_run=256)
    assert spec.local_shape(4) == (256, 4)
    local = torch.arange(256 * 4).view(256, 4)
    (box,) = spec.boxes(local, 1, 4)
    assert box.start == (256, 0)
    assert torch.equal(box.tensor, local[:253])
    assert spec.boxes(local, 2, 4) == spec.boxes(local, 3, 4) == ()


def test_replicated_parameter_is_one_box_everywhere() -> None:
    spec = ShardSpec(shape=(3, 4))
    for rank in range(4):
        (box,) = spec.boxes(torch.zeros(3, 4), rank, 4)
        assert (box.start, box.tensor.shape) == ((0, 0), (3, 4))
    assert spec.local_shape(4) == (3, 4)


def test_parameter_without_a_spec_is_an_error_and_not_taken_for_whole() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"shape \(2, 3\) carries no ShardSpec"):
        shard_spec(parameter)
    with pytest.raises(ValueError, match="carries no ShardSpec"):
        init_normal(parameter, seed=1, name="", std=1.0, rank=0, size=2)
    layer = nn.Linear(3, 2)
    mark_whole(layer)
    assert shard_spec(layer.weight) == ShardSpec(shape=(2, 3))
    set_shard_spec(parameter, ShardSpec(shape=(2, 6), dim=1))
    assert shard_spec(parameter) == ShardSpec(shape=(2, 6), dim=1)


Change = Callable[[nn.Module], nn.Module]


def _assign(module: nn.Module) -> nn.Module:
    module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)
    return module


def _set(module: nn.Module) -> nn.Module:
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(parameter.detach().clone()))
    return module


def _overwritten(module: nn.Module) -> nn.Module:
    """As ``to`` does where a setting of the process asks for new parameters."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return module.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def _swapped(module: nn.Module) -> nn.Module:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return module.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _replaced(module: nn.Module) -> nn.Module:
    replace_parameters(module, lambda _, old: torch.empty(old.shape, dtype=old.dtype))
    return module


IN_PLACE: dict[str, Change] = {
    "to_empty": lambda module: module.to("meta").to_empty(device="cpu"),
    "to_empty of its parent": lambda module: (
        nn.Sequential(module).to("meta").to_empty(device="cpu")
    ),
    "dtype": lambda module: module.bfloat16(),
    "overwritten": _overwritten,
    "swapped": _swapped,
    "assign": _assign,
    "setattr": _set,
    "replaced": _replaced,
    "frozen": lambda module: module.requires_grad_(False),
}


def test_layers_keep_their_specs_whatever_torch_does_to_their_parameters() -> None:
    run_ranks(1, check_specs_stay)


def check_specs_stay() -> None:
    group = build_groups(ParallelDims()).tensor
    for build in (column_layer, row_layer, embedding):
        for name, change in IN_PLACE.items():
            layer = build(group)
            # A mark that was put on after the layer was made, as that of a tied weight.
            set_shard_spec(layer.weight, replace(shard_spec(layer.weight), tied=True))
            want = {key: shard_spec(parameter) for key, parameter in layer.named_parameters()}
            change(layer)
            got = {key: shard_spec(parameter) for key, parameter in layer.named_parameters()}
            assert got == want, (build, name)


def column_layer(group: ProcessGroup) -> ColumnParallelLinear:
    return ColumnParallelLinear(4, 6, num_blocks=2, group=group)


def row_layer(group: ProcessGroup) -> RowParallelLinear:
    return RowParallelLinear(4, 6, sequence_parallel=True, group=group)


def embedding(group: ProcessGroup) -> VocabParallelEmbedding:
    return VocabParallelEmbedding(7, 4, padding_multiple=4, group=group)


class Sharded(ShardedModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        set_shard_spec(self.weight, ShardSpec(shape=(4, 3), dim=0))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_keep_their_specs(copied: Callable[[Sharded], Sharded]) -> None:
    assert shard_spec(copied(Sharded()).weight) == ShardSpec(shape=(4, 3), dim=0)


def test_copied_layers_compute_over_the_same_group() -> None:
    run_ranks(2, check_copies)


def check_copies() -> None:
    group = build_groups(ParallelDims(tensor=2)).tensor
    x = torch.randn(2, 4, 4)
    layers: list[tuple[nn.Module, torch.Tensor]] = [
        (ColumnParallelLinear(4, 8, num_blocks=2, group=group), x),
        (row_layer(group), x[..., :2]),
        (embedding(group), torch.arange(6).view(2, 3)),
    ]
    for layer, inputs in layers:
        copied = copy.deepcopy(layer)
        assert copied.group is group
        assert torch.equal(copied(inputs), layer(inputs))
        for ours, theirs in zip(layer.parameters(), copied.parameters(), strict=True):
            assert shard_spec(theirs) == shard_spec(ours)
            assert ours.data_ptr() != theirs.data_ptr()


def test_a_parametrized_weight_keeps_its_spec_or_is_an_error() -> None:
    module = Sharded()
    parametrize.register_parametrization(module, "weight", nn.Identity())
    original = module.parametrizations.weight.original
    assert shard_spec(original) == ShardSpec(shape=(4, 3), dim=0)
    module.to("meta").to_empty(device="cpu")
    with pytest.raises(ValueError, match="carries no ShardSpec"):
        shard_spec(module.parametrizations.weight.original)


def test_other_modules_lose_their_specs_with_an_error() -> None:
    norm = nn.LayerNorm(3)
    set_shard_spec(norm.weight, ShardSpec(shape=(3,), sum_gradient=True))
    norm.to("meta").to_empty(device="cpu")
    with pytest.raises(ValueError, match="carries no ShardSpec"):
        shard_spec(norm.weight)


def test_a_layer_made_on_the_meta_device_starts_with_other_weights_on_each_rank() -> None:
    halves = run_ranks(2, start_from_meta)
    assert not torch.equal(*halves)
    (whole,) = run_ranks(1, start_from_meta)
    assert torch.equal(torch.cat(halves), whole)


def start_from_meta() -> torch.Tensor:
    size = torch.distributed.get_world_size()
    group = build_groups(ParallelDims(tensor=size)).tensor
    layer = ColumnParallelLinear(4, 8, group=group, device="meta").to_empty(device="cpu")
    init_normal(layer.weight, seed=1, name="", std=1.0, rank=group.rank(), size=size)
    return layer.weight.detach()
