"""The engine on DeepSpeed makes the steps of the engine on plain torch, at every layout it has.

In fp32, with dropout, warm-up, clipping, weight decay and tokens that do not count. The suite takes
a few of all layouts; the marker nightly has the rest.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron.config.training import dtype_named
from mpu import build_groups
from tests.distributed import run_ranks
from tests.figures import Figure
from tests.megatron.engine.layouts import Zero
from tests.megatron.engine.training import (
    Layout,
    Run,
    build_deepspeed_engine,
    make_config,
    run_training,
    train,
)

pytest.importorskip("deepspeed", reason="the package deepspeed is optional")

STEPS = 20
TOLERANCE = 1e-5


def every() -> Iterator[Layout]:
    """All layouts of one or two ranks an axis; those with tensor ranks have the sequence cut."""
    for tensor, pipeline, data, zero, tied in product(
        (1, 2), (1, 2), (1, 2), get_args(Zero), (True, False)
    ):
        if pipeline == 1 or zero < 2:
            yield Layout(
                tensor=tensor,
                pipeline=pipeline,
                data=data,
                zero=zero,
                sequence=tensor > 1 and tied,
                micro_batch=2 // data,
                tied=tied,
                num_layers=2 if pipeline == 1 else 4,
                engine="deepspeed",
            )


EVERY = list(every())

CHOSEN = [
    Layout(micro_batch=2, num_layers=2, engine="deepspeed"),
    Layout(zero=3, micro_batch=2, tied=False, num_layers=2, engine="deepspeed"),
    Layout(data=2, zero=2, num_layers=2, engine="deepspeed"),
    Layout(tensor=2, data=2, tied=False, num_layers=2, engine="deepspeed"),
    Layout(tensor=2, data=2, zero=1, sequence=True, num_layers=2, engine="deepspeed"),
    Layout(tensor=2, data=2, zero=3, sequence=True, num_layers=2, engine="deepspeed"),
    Layout(tensor=2, pipeline=2, sequence=True, micro_batch=2, engine="deepspeed"),
    Layout(pipeline=2, data=2, zero=1, engine="deepspeed"),
    Layout(tensor=2, pipeline=2, data=2, zero=1, tied=False, engine="deepspeed"),
]
# Recomputation, and other numbers of microbatches.
OTHERS = [
    Layout(data=2, zero=3, micro_batch=4, recompute="full", num_layers=2, engine="deepspeed"),
    Layout(pipeline=2, micro_batch=1, recompute="selective", engine="deepspeed"),
]
NIGHTLY = [
    pytest.param(layout, marks=pytest.mark.nightly) for layout in EVERY if layout not in CHOSEN
]


@cache
def torch_run(tied: bool, num_layers: int) -> Run:
    layout = Layout(micro_batch=2, tied=tied, num_layers=num_layers)
    return run_training(layout, STEPS, "fp32")


@pytest.mark.parametrize("layout", [*CHOSEN, *OTHERS, *NIGHTLY], ids=str)
def test_training_equals_the_engine_torch(layout: Layout, figure: Figure) -> None:
    want, got = torch_run(layout.tied, layout.num_layers), run_training(layout, STEPS, "fp32")
    steps = list(zip(got.results, want.results, strict=True))
    worst = {
        "loss": max(abs(a.loss / b.loss - 1) for a, b in steps),
        "norm": max(abs(a.grad_norm / b.grad_norm - 1) for a, b in steps),
        "evaluation": abs(got.evaluation / want.evaluation - 1),
    }
    grid = f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"
    figure(f"deepspeed equals torch: {grid}, ZeRO {layout.zero}", **worst)
    figure("deepspeed equals torch: all of them", **worst)
    assert {name: error for name, error in worst.items() if not error <= TOLERANCE} == {}


def test_every_layout_of_deepspeed_is_there_once() -> None:
    assert len(set(map(str, EVERY))) == len(EVERY) == 48
    assert set(CHOSEN) <= set(EVERY)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_offloading_changes_nothing(zero: Zero, figure: Figure) -> None:
    layout = Layout(data=2, zero=zero, num_layers=2, engine="deepspeed")
    want = run_training(layout, STEPS, "fp32")
    got = run_training(replace(layout, offload=True), STEPS, "fp32")
    steps = list(zip(got.results, want.results, strict=True))
    worst = {
        "loss": max(abs(a.loss / b.loss - 1) for a, b in steps),
        "norm": max(abs(a.grad_norm / b.grad_norm - 1) for a, b in steps),
    }
    figure("deepspeed with the optimizer's state on the CPU", **worst)
    assert max(worst.values()) <= TOLERANCE


def test_deepspeed_makes_no_process_group() -> None:
    for layout in (CHOSEN[5], CHOSEN[8]):
        assert run_ranks(layout.world_size, count_groups, layout) == [0] * layout.world_size


def count_groups(layout: Layout) -> int:
    """Those that are made besides the ones of the rank grid, from building to the first step."""
    config = make_config(layout)
    groups = build_groups(config.layout(dist.get_world_size()))
    with patch.object(dist, "new_group", wraps=dist.new_group) as new_group:
        engine = build_deepspeed_engine(config, groups)
        list(train(engine, config, groups, range(1)))
    return new_group.call_count


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("layout", [CHOSEN[2], CHOSEN[5], CHOSEN[7]], ids=str)
def test_low_precision_keeps_main_weights_and_sums_of_gradients_in_fp32(
    layout: Layout, dtype: Literal["bf16", "fp16"]
) -> None:
    """So that its losses stay near those of the engine torch, which does so too."""
    got = run_training(layout, 5, dtype)
    want = run_training(replace(layout, engine="torch"), 5, dtype)
    assert {tensor.dtype for tensor in got.state.values()} == {torch.float32}
    low = dtype_named(dtype)
    assert any(not torch.equal(it, it.to(low).float()) for it in got.state.values())
    for a, b in zip(got.results, want.results, strict=True):
        assert abs(a.loss / b.loss - 1) < 1e-3


@pytest.mark.nightly
def test_offloading_to_nvme_changes_nothing(tmp_path: Path, figure: Figure) -> None:
    """Nightly, because DeepSpeed compiles its access to files, which takes minutes."""
    kept: dict[str, Any] = {"device": "nvme", "nvme_path": str(tmp_path)}
    want = run_ranks(2, train_wide, {})
    got = run_ranks(2, train_wide, {"zero_optimization": {"offload_optimizer": kept}})
    # The main weights and both moments of each rank.
    assert len(list(tmp_path.rglob("*.swp"))) >= 2 * 3
    worst = max(abs(a / b - 1) for a, b in zip(got[0], want[0], strict=True))
    figure("deepspeed with the optimizer's state on NVMe", loss=worst)
    assert worst <= TOLERANCE


def train_wide(options: dict[str, Any]) -> list[float]:
    """Losses of a model of which DeepSpeed does not keep the state in memory for being small."""
    config = make_config(Layout(data=2, zero=3, num_layers=2, engine="deepspeed"))
    config = replace(
        config,
        model=replace(config.model, hidden_size=256),
        engine=replace(config.engine, deepspeed=options),
    )
    groups = build_groups(config.layout(dist.get_world_size()))
    engine = build_deepspeed_engine(config, groups)
    return [result.loss for result in train(engine, config, groups, range(5))]
