"""The gradient norm is that of float64, whatever the size, the values and the cut."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config import Config
from megatron.optim.parameters import square_sum
from tests.distributed import run_ranks
from tests.figures import Figure
from tests.megatron.engine.training import (
    CPU,
    DEEPSPEED_KINDS,
    Dtype,
    Layout,
    build_any_engine,
    make_config,
    train,
)

TOLERANCE = 1e-6
GREATEST_NORM = 0.5

SPREAD = 38.0
"""Powers of ten on either side of 1: from subnormal numbers to the greatest of float32."""


def spread(size: int) -> Tensor:
    return torch.randn(size).sign() * 10.0 ** (SPREAD * (2 * torch.rand(size) - 1))


VALUES: dict[str, Callable[[int], Tensor]] = {
    "normal": torch.randn,
    "equal": lambda size: torch.full((size,), 0.1),
    "spread over 76 powers of ten": spread,
    "squares too large": lambda size: 1e20 * torch.randn(size),
    "squares too small": lambda size: 1e-25 * torch.randn(size),
    "subnormal": lambda size: torch.randn(size) * 1e-40,
    "one large": lambda size: torch.full((size,), 1e-4).index_fill_(0, torch.tensor([0]), 1.0),
    "bf16": lambda size: torch.randn(size).bfloat16(),
    "fp16": lambda size: torch.randn(size).half(),
    "fp64": lambda size: torch.randn(size, dtype=torch.float64),
    "not contiguous": lambda size: torch.randn(2, size).t()[:, 0],
}

SIZES = [2**power for power in range(10, 27)]
CASES = [
    pytest.param(size, kind, marks=[] if size in SIZES[::5] else pytest.mark.nightly)
    for size in SIZES
    for kind in VALUES
]


def exact(gradient: Tensor) -> float:
    """The norm, by numbers of which none is far from 1."""
    largest = gradient.abs().max().double()
    parts = [(part.double() / largest).square().sum().item() for part in gradient.split(2**18)]
    return math.sqrt(math.fsum(parts)) * largest.item()


@pytest.mark.parametrize(("size", "kind"), CASES)
def test_norm_is_that_of_float64(size: int, kind: str, figure: Figure) -> None:
    torch.manual_seed(size)
    gradient = VALUES[kind](size)
    want = exact(gradient)
    worst = max(
        abs(square_sum(cut, CPU).sqrt().item() / want - 1)
        for cut in ([gradient], gradient.chunk(3), [gradient[:77], gradient[77:]])
    )
    figure("gradient norm beside float64", sizes=f"2^10 to 2^{round(math.log2(size))}", error=worst)
    assert worst <= TOLERANCE


def test_nothing_has_the_norm_zero() -> None:
    assert square_sum([], CPU) == 0
    assert square_sum([torch.zeros(0), torch.zeros(3, 0)], CPU) == 0
    assert square_sum([torch.zeros(0), torch.full((2, 2), 3.0)], CPU) == 36


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_not_finite_comes_through(value: float, dtype: torch.dtype) -> None:
    for size in (1, 10, 2**16 + 1, 2**18):
        for place in {0, size // 2, size - 1}:
            gradient = torch.ones(size, dtype=dtype)
            gradient[place] = value
            assert not square_sum([torch.ones(5), gradient], CPU).isfinite(), (size, place)


def test_norm_takes_memory_for_a_part_of_the_gradient_only() -> None:
    gradient = torch.ones(2**22)
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        square_sum([gradient], CPU)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= gradient.nbytes / 4


LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(tensor=4),
    Layout(pipeline=2, micro_batch=2),
    Layout(data=2, zero=1),
    Layout(data=2, zero=3),
    *DEEPSPEED_KINDS[2:3],
]
OTHERS = [
    Layout(tensor=2, sequence=True, micro_batch=2),
    Layout(data=2),
    Layout(data=2, zero=2),
    *DEEPSPEED_KINDS[:2],
    *DEEPSPEED_KINDS[3:],
]


@pytest.mark.parametrize(
    ("hidden_size", "layouts"),
    [(128, LAYOUTS), pytest.param(1024, LAYOUTS + OTHERS, marks=pytest.mark.nightly)],
    ids=["sample", "all"],
)
def test_norm_and_clip_factor_are_the_same_at_every_layout(
    hidden_size: int, layouts: list[Layout], figure: Figure
) -> None:
    """Of 0.8 million elements, and of 50 million; beside one process in float64."""
    ((want, _),) = run_ranks(1, first_norm, Layout(), hidden_size, "fp64")
    found = {}
    for layout in layouts:
        ranks = run_ranks(layout.world_size, first_norm, layout, hidden_size, "fp32")
        assert len(set(ranks)) == 1
        found[str(layout)] = ranks[0]
    norms = [norm for norm, _ in found.values()]
    errors = {name: abs(norm / want - 1) for name, (norm, _) in found.items()}
    clip_errors = [abs(clip * (want + 1e-6) / GREATEST_NORM - 1) for _, clip in found.values()]
    figure(
        f"fp32 gradient norm at {len(layouts)} layouts, hidden size {hidden_size}",
        error=max(errors.values()),
        clip_error=max(clip_errors),
        apart=max(norms) / min(norms) - 1,
    )
    assert want > GREATEST_NORM
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}
    assert max(clip_errors) <= TOLERANCE


def first_norm(layout: Layout, hidden_size: int, dtype: Dtype) -> tuple[float, float]:
    """The gradient norm of the first step, and by what the gradient was multiplied."""
    config = with_hidden_size(make_config(layout, dtype), hidden_size)
    engine, groups = build_any_engine(config)
    (result,) = train(engine, config, groups, range(1))
    # The first moment is a part of the clipped gradient, and nothing else yet.
    firsts = [state for state in engine.state() if state.owned and state.kind == "exp_avg"]
    moments = [box.tensor for state in firsts for box in state.boxes]
    square = square_sum(moments, CPU)
    dist.all_reduce(square)
    clipped = square.sqrt().item() / (1 - config.optimizer.beta1)
    return result.grad_norm, clipped / result.grad_norm


def with_hidden_size(config: Config, hidden_size: int) -> Config:
    model = replace(config.model, hidden_size=hidden_size)
    optimizer = replace(config.optimizer, max_grad_norm=GREATEST_NORM)
    return replace(config, model=model, optimizer=optimizer)
