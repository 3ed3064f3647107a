"""No infinity and no NaN in the state stays unseen, whichever rank and engine holds it."""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.errors import NonFiniteError
from megatron.training.finite import check_finite, is_finite
from mpu import Box, ShardedTensor
from tests.distributed import run_ranks
from tests.figures import Figure
from tests.megatron.engine.training import (
    CPU,
    DEEPSPEED_KINDS,
    Layout,
    build_any_engine,
    make_config,
    train,
)

LAYOUTS = [
    Layout(tensor=2, pipeline=2, micro_batch=2, sequence=True),
    Layout(data=2, zero=3),
    *DEEPSPEED_KINDS[-1:],
]
OTHERS = [
    Layout(),
    Layout(data=2),
    *(Layout(tensor=2, data=2, zero=zero) for zero in (1, 2, 3)),
    *DEEPSPEED_KINDS[:-1],
]
NIGHTLY = [pytest.param(layout, marks=pytest.mark.nightly) for layout in OTHERS]
VALUES = (math.nan, math.inf, -math.inf)
KINDS = ("weight", "exp_avg", "exp_avg_sq")
EVERY = 11
"""Of the tensors of a kind, each eleventh is spoiled in turn."""


@pytest.mark.parametrize("layout", [*LAYOUTS, *NIGHTLY], ids=str)
def test_everything_that_is_not_finite_is_found_and_named(layout: Layout, figure: Figure) -> None:
    counts = run_ranks(layout.world_size, spoil_in_turn, layout)
    figure("state spoiled in turn", layout=str(layout), found=counts[0])
    assert counts == [counts[0]] * layout.world_size
    assert counts[0] >= 3 * len(KINDS) * layout.world_size


def spoil_in_turn(layout: Layout) -> int:
    """How many numbers were spoiled, one after another, and all were found."""
    config = make_config(layout)
    engine, groups = build_any_engine(config)
    list(train(engine, config, groups, range(1)))
    check(engine)
    count = 0
    for rank, kind in product(range(dist.get_world_size()), KINDS):
        for name, number, value in plan(engine, rank, kind):
            mine = None
            if rank == dist.get_rank():
                mine = held(engine, kind, name)
                before = mine.view(-1)[number].clone()
                mine.view(-1)[number] = value
            with pytest.raises(NonFiniteError) as caught:
                check(engine)
            assert str(caught.value) == f"the {kind} of {name} is not finite on rank {rank}"
            assert caught.value.on_every_rank
            if mine is not None:
                mine.view(-1)[number] = before
            check(engine)
            count += 1
    return count


def check(engine: Any) -> None:
    check_finite(engine.state(), CPU, group=None)


def plan(engine: Any, rank: int, kind: str) -> list[tuple[str, int, float]]:
    """Of some tensors of ``rank``, the number of an element, and what it shall become."""
    mine = [(name, flat.numel()) for name, flat in tensors(engine, kind)]
    ranks: list[list[tuple[str, int]]] = [mine] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return [
        (name, (0, size // 2, size - 1)[turn % 3], VALUES[turn // 3 % 3])
        for turn, (name, size) in enumerate(ranks[rank][::EVERY])
    ]


def tensors(engine: Any, kind: str) -> Iterator[tuple[str, Tensor]]:
    """The last box of every tensor of that kind of which this rank holds something."""
    for state in engine.state():
        if state.kind == kind and state.boxes:
            yield state.name, state.boxes[-1].tensor


def held(engine: Any, kind: str, name: str) -> Tensor:
    return dict(tensors(engine, kind))[name]


def test_all_that_is_not_finite_is_counted() -> None:
    for message in run_ranks(2, spoil_several):
        assert message == (
            "the weight of language_model.transformer.final_layernorm.weight is not finite on "
            "ranks 0, 1, nor are parts of 1 other tensors"
        )


def spoil_several() -> str:
    engine, _ = build_any_engine(make_config(Layout(data=2)))
    name = "language_model.transformer.final_layernorm.weight"
    held(engine, "weight", name).fill_(torch.nan)
    if dist.get_rank() == 1:
        held(engine, "exp_avg_sq", name)[3] = torch.inf
    with pytest.raises(NonFiniteError) as caught:
        check(engine)
    return str(caught.value)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 1000, 2**17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_no_place_is_overlooked(size: int, dtype: torch.dtype) -> None:
    tensor = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)
    state = ShardedTensor("weight", "w", (size,), (Box((0,), tensor),), owned=True)
    assert is_finite(state)
    for place, value in product({0, 1, size // 3, size - 2, size - 1}, VALUES):
        before = tensor[place % size].clone()
        tensor[place % size] = value
        assert not is_finite(state), (place, value)
        tensor[place % size] = before
    assert is_finite(state)
