"""Traffic by arithmetic equals what live steps of the engine hand to their process groups."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeAlias, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config import Config
from megatron.planning.communication import (
    Traffic,
    TrafficAxis,
    on_wire_per_step,
    rank_traffic,
    sent_per_step,
)
from mpu import ParallelGroups
from tests.distributed import run_ranks
from tests.figures import Figure
from tests.megatron.engine.training import Layout, build_engine, make_config, microbatches

Found: TypeAlias = dict[str, Traffic]
"""By the axes of a group."""

AXES: tuple[TrafficAxis, ...] = get_args(TrafficAxis)

# Of each operation: what its bytes count as, and the positions, among its arguments, of the tensors
# that have them and of the group.
OPERATIONS = {
    "allreduce_": ("reduced", 0, 1),
    "_allgather_base_": ("gathered", 0, 2),
    "_reduce_scatter_base_": ("scattered", 1, 2),
    "send": ("sent", 0, 1),
}


@dataclass(frozen=True)
class Case:
    """A run whose traffic is counted."""

    layout: Layout
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"
    hidden_dropout: float = 0.1

    def __str__(self) -> str:
        dropout = "" if self.hidden_dropout else ", no dropout"
        return f"{self.layout}, {self.dtype}{dropout}"

    @property
    def config(self) -> Config:
        config = make_config(self.layout, self.dtype)
        return replace(config, model=replace(config.model, hidden_dropout=self.hidden_dropout))


CASES = [
    Case(Layout()),
    Case(Layout(tensor=2)),
    Case(Layout(tensor=2, recompute="full")),
    Case(Layout(tensor=2, recompute="full"), hidden_dropout=0.0),
    Case(Layout(tensor=2, recompute="selective"), "fp64"),
    Case(Layout(tensor=2, sequence=True), "bf16"),
    Case(Layout(tensor=2, sequence=True, recompute="full", micro_batch=2), hidden_dropout=0.0),
    Case(Layout(pipeline=2)),
    Case(Layout(pipeline=2, schedule="interleaved_1f1b", chunks=2)),
    Case(Layout(pipeline=2, schedule="zero_bubble", tied=False)),
    Case(Layout(data=2)),
    Case(Layout(data=2, zero=1), "bf16"),
    Case(Layout(data=2, zero=2), "bf16"),
    Case(Layout(data=2, zero=3)),
    Case(Layout(data=2, zero=3, recompute="full"), "bf16"),
    Case(Layout(pipeline=2, data=2, zero=2)),
    Case(Layout(pipeline=2, data=2, zero=3, schedule="interleaved_1f1b", chunks=2)),
    Case(Layout(tensor=2, data=2, zero=2, sequence=True)),
    Case(Layout(tensor=2, pipeline=2, data=2, zero=1, sequence=True), "bf16"),
]


class GroupTraffic(TorchDispatchMode):
    """Counts, while entered, what this rank hands to each of its groups of more than one rank.

    Axes of the same ranks share a group, whose traffic is found under the names of all of them.
    """

    def __init__(self, groups: ParallelGroups) -> None:
        super().__init__()
        names = [getattr(groups, axis).group_name for axis in AXES]
        self.axes = {
            name: " and ".join(
                axis for axis, other in zip(AXES, names, strict=True) if other == name
            )
            for name in names
        }
        self.found: Found = {axes: Traffic() for axes in self.axes.values()}

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name != "recv_":
            kind, tensors, group = OPERATIONS[name]
            self._count(kind, args[tensors], dist.ProcessGroup.unbox(args[group]))
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, tensors: Tensor | list[Tensor], group: dist.ProcessGroup) -> None:
        if group.size() > 1:
            size = sum(t.nbytes for t in ([tensors] if isinstance(tensors, Tensor) else tensors))
            self.found[self.axes[group.group_name]] += Traffic(**{kind: size})


def count_steps(cases: list[Case]) -> list[Found]:
    """What this rank sends in a step of each case."""
    return [count_step(case) for case in cases]


def count_step(case: Case) -> Found:
    """What this rank sends in the second step; the first may prepare something."""
    config = case.config
    engine, groups = build_engine(config)
    engine.train_step(microbatches(config, 0, groups), lr=1e-3)
    batches = microbatches(config, 1, groups)
    with GroupTraffic(groups) as traffic:
        engine.train_step(batches, lr=1e-3)
    return traffic.found


@pytest.fixture(scope="module")
def counted() -> dict[Case, list[Found]]:
    """What each rank of each case sends; cases of as many ranks run in the same processes."""
    found: dict[Case, list[Found]] = {}
    for world_size in {case.layout.world_size for case in CASES}:
        cases = [case for case in CASES if case.layout.world_size == world_size]
        ranks = run_ranks(world_size, count_steps, cases)
        found |= {case: [rank[at] for rank in ranks] for at, case in enumerate(cases)}
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_formula_counts_every_collective_of_a_step(
    case: Case, counted: dict[Case, list[Found]], figure: Figure
) -> None:
    config, ranks = case.config, counted[case]
    dims = config.layout(case.layout.world_size)
    # The first ranks of the pipeline's stages; of a cut that does not divide, they have the most.
    firsts = ranks[:: dims.tensor * dims.data]
    stages = [rank_traffic(config, dims, stage) for stage in range(dims.pipeline)]
    assert firsts == [together(stage, first) for stage, first in zip(stages, firsts, strict=True)]
    groups = {axes for rank in ranks for axes in rank}
    busiest = {axes: max(rank.get(axes, Traffic()).payload for rank in ranks) for axes in groups}
    assert busiest == {
        axes: max(rank.get(axes, Traffic()).payload for rank in firsts) for axes in groups
    }
    assert sent_per_step(config, dims) == {
        axis: max(stage[axis].payload for stage in stages) for axis in AXES
    }
    figure(f"bytes sent in a step: {case}", **busiest, formula="equal")


def together(traffic: Mapping[TrafficAxis, Traffic], groups: Iterable[str]) -> Found:
    """What the axes of each of ``groups`` send in all."""
    return {
        axes: sum((traffic[axis] for axis in AXES if axis in axes.split(" and ")), Traffic())
        for axes in groups
    }


def test_ring_passes_a_tensor_on_as_often_as_theory_says() -> None:
    assert Traffic(reduced=12).on_wire(4) == 2 * 9
    assert Traffic(gathered=12).on_wire(4) == 9
    assert Traffic(scattered=12).on_wire(3) == 8
    assert Traffic(sent=12).on_wire(4) == 12


def test_sequence_parallelism_adds_the_gradients_of_norms_and_biases_only() -> None:
    plain, sequence = (Case(Layout(tensor=2, sequence=on)).config for on in (False, True))
    wires = [on_wire_per_step(config, config.layout(2))["tensor"] for config in (plain, sequence)]
    vectors = 6 * plain.model.num_layers + 4
    # Each begins at a multiple of 64 elements, and the last one ends where it ends.
    summed = (vectors - 1) * 64 + plain.model.hidden_size
    assert wires[1] - wires[0] == summed * torch.float32.itemsize
