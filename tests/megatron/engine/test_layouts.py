"""Every layout trains like one process: losses, gradient norms, evaluation, weights and moments.

In float64, with dropout, warm-up, clipping, weight decay and tokens that do not count. The suite
takes a few of all layouts, and other numbers of microbatches; the marker nightly has the rest.
"""

import math
from functools import cache
from itertools import combinations

import pytest
from torch import Tensor

from tests.figures import Figure
from tests.megatron.engine.layouts import CHOSEN, EVERY, MOST_RANKS
from tests.megatron.engine.training import NUM_HEADS, NUM_LAYERS, Layout, Run, run_training

STEPS = 20
TOLERANCE = 1e-12
AXES = ("tensor", "pipeline", "data", "zero", "schedule", "sequence", "tied", "recompute")
OTHERS = [
    # Other numbers of microbatches, from one to eight.
    Layout(micro_batch=1, num_layers=2),
    Layout(micro_batch=8, num_layers=2),
    Layout(tensor=2, sequence=True, micro_batch=4, num_layers=2),
    Layout(pipeline=2, micro_batch=1, recompute="selective"),
    Layout(pipeline=2, micro_batch=4, schedule="zero_bubble"),
    # More data ranks than some parameters have rows.
    Layout(data=4, micro_batch=2, zero=1, num_layers=2),
    Layout(data=4, micro_batch=1, zero=2, tied=False, num_layers=2),
]
NIGHTLY = [
    pytest.param(layout, marks=pytest.mark.nightly) for layout in EVERY if layout not in CHOSEN
]


@cache
def one_process(tied: bool, num_layers: int) -> Run:
    return run_training(Layout(micro_batch=2, tied=tied, num_layers=num_layers), STEPS)


@pytest.mark.parametrize("layout", [*CHOSEN, *OTHERS, *NIGHTLY], ids=str)
def test_training_equals_one_process(layout: Layout, figure: Figure) -> None:
    want, got = one_process(layout.tied, layout.num_layers), run_training(layout, STEPS)
    steps = list(zip(got.results, want.results, strict=True))
    worst = {
        "loss": max(difference(a.loss, b.loss) for a, b in steps),
        "norm": max(difference(a.grad_norm, b.grad_norm) for a, b in steps),
        "evaluation": difference(got.evaluation, want.evaluation),
        "state": max(errors(got.state, want.state).values()),
    }
    grid = f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"
    figure(f"training equals one process: {grid}", **worst)
    figure("training equals one process: all of them", **worst)
    assert {name: error for name, error in worst.items() if not error <= TOLERANCE} == {}


def difference(got: float, want: float) -> float:
    """Relative."""
    return abs(got / want - 1)


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each tensor, in parts of its largest element."""
    assert got.keys() == want.keys()
    found = {}
    for name in want:
        a, b = comparable(name, got[name]), comparable(name, want[name])
        found[name] = ((a - b).abs().max() / b.abs().max()).item()
    assert not [name for name, error in found.items() if math.isnan(error)]
    return found


def comparable(name: str, tensor: Tensor) -> Tensor:
    """All of ``tensor``, without biases of keys.

    A softmax cancels those: their gradient is rounding alone, which Adam scales up.
    """
    if not name.endswith("query_key_value.bias"):
        return tensor
    return tensor.view(NUM_HEADS, 3, -1)[:, ::2]


@pytest.mark.parametrize("tied", [True, False])
def test_the_compared_run_learns_warms_up_and_clips(tied: bool) -> None:
    run = one_process(tied, NUM_LAYERS)
    results = run.results
    assert results[-1].loss < results[0].loss
    assert sum(result.grad_norm > 0.5 for result in results) > STEPS / 2
    assert len({result.loss for result in results}) == STEPS
    # Each weight has changed its moments, so that a gradient that went missing would show.
    assert all(bool((moment != 0).any()) for moment in run.state.values())


def test_every_layout_is_there_once() -> None:
    assert len(set(map(str, EVERY))) == len(EVERY) == 320
    assert max(layout.world_size for layout in EVERY) == MOST_RANKS


def test_each_two_values_of_two_axes_meet_in_the_suite() -> None:
    everywhere = set().union(*map(pairs, EVERY))
    assert everywhere - set().union(*map(pairs, CHOSEN)) == set()
    assert set(CHOSEN) <= set(EVERY)


def pairs(layout: Layout) -> set[tuple[tuple[str, object], ...]]:
    """Every two axes with their values."""
    return set(combinations([(axis, getattr(layout, axis)) for axis in AXES], 2))
