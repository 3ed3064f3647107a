"""One state for all layouts: a run that changes its layout again and again, through saves.

At each change the whole state is bit for bit what was saved, and the losses are those of a run that
never changed, to rounding.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.engine.base import StepResult
from megatron.launch import Launch
from megatron.training.saving import RunCheckpoints, open_newest
from mpu import ShardedTensor
from tests.distributed import run_ranks
from tests.figures import Figure
from tests.megatron.engine.training import (
    CPU,
    GLOBAL_BATCH,
    Dtype,
    Layout,
    build_any_engine,
    join_states,
    make_config,
    run_training,
    train,
)

TOLERANCE = 1e-12
FP32_TOLERANCE = 1e-5
STEPS = 3
"""Of each layout."""

CHAIN = [
    Layout(micro_batch=2),
    Layout(tensor=2, pipeline=2, schedule="zero_bubble", micro_batch=2),
    Layout(data=4, zero=3, micro_batch=2),
    Layout(pipeline=4, micro_batch=2, recompute="full"),
    Layout(tensor=2, data=2, zero=1, sequence=True),
    Layout(pipeline=2, data=2, zero=2, schedule="interleaved_1f1b", chunks=2),
    Layout(tensor=4, pipeline=2, zero=1, micro_batch=2, recompute="selective"),
    Layout(pipeline=2, data=4, zero=1, schedule="zero_bubble"),
]


# DeepSpeed computes in fp32 at most.
ENGINES = [
    Layout(micro_batch=2),
    Layout(data=2, zero=1, engine="deepspeed"),
    Layout(tensor=2, data=2, zero=3, sequence=True, engine="deepspeed"),
    Layout(pipeline=2, micro_batch=2),
    Layout(pipeline=2, zero=1, micro_batch=2, engine="deepspeed"),
    Layout(tensor=2, engine="deepspeed"),
]


def test_a_run_changes_its_layout_seven_times(tmp_path: Path, figure: Figure) -> None:
    worst = go_through(CHAIN, "fp64", tmp_path)
    figure("a chain of 8 layouts", differing_bits=0, **worst)
    assert max(worst.values()) <= TOLERANCE


def test_a_run_changes_its_engine(tmp_path: Path, figure: Figure) -> None:
    pytest.importorskip("deepspeed", reason="the package deepspeed is optional")
    worst = go_through(ENGINES, "fp32", tmp_path)
    figure("a chain of 6 layouts on 2 engines", differing_bits=0, **worst)
    assert max(worst.values()) <= FP32_TOLERANCE


def go_through(chain: Sequence[Layout], dtype: Dtype, folder: Path) -> dict[str, float]:
    """Train at each layout in turn; how far the run is from one that never changed."""
    want = run_training(chain[0], STEPS * len(chain), dtype)
    results: list[StepResult] = []
    saved: dict[str, torch.Tensor] = {}
    for layout in chain:
        ranks = run_ranks(layout.world_size, go_on, layout, dtype, folder)
        loaded = join_states([rank[0] for rank in ranks])
        if saved:
            assert loaded.keys() == saved.keys()
            assert [name for name in saved if not torch.equal(loaded[name], saved[name])] == []
        assert all(rank[1] == ranks[0][1] for rank in ranks), "ranks report different numbers"
        results += ranks[0][1]
        saved = join_states([rank[2] for rank in ranks])
    steps = list(zip(results, want.results, strict=True))
    return {
        "loss": max(abs(got.loss / want.loss - 1) for got, want in steps),
        "norm": max(abs(got.grad_norm / want.grad_norm - 1) for got, want in steps),
    }


def go_on(
    layout: Layout, dtype: Dtype, folder: Path
) -> tuple[list[ShardedTensor], list[StepResult], list[ShardedTensor]]:
    """The state that was opened, the next steps, and the state that is saved."""
    config = replace(make_config(layout, dtype), folder=folder)
    engine, groups = build_any_engine(config)
    launch = Launch(dist.get_rank(), dist.get_world_size(), CPU, groups)
    checkpoints = RunCheckpoints(config, launch, engine, None, {})
    progress = checkpoints.resume(open_newest(config))
    opened = copy_of(engine.state())
    results = list(train(engine, config, groups, range(progress.step, progress.step + STEPS)))
    for _ in results:
        progress = progress.after(GLOBAL_BATCH, config.model.seq_length)
    checkpoints.save(progress)
    return opened, results, engine.state()


def copy_of(states: list[ShardedTensor]) -> list[ShardedTensor]:
    """That later steps do not change."""
    return [
        replace(
            state,
            boxes=tuple(replace(box, tensor=box.tensor.detach().clone()) for box in state.boxes),
        )
        for state in states
    ]
