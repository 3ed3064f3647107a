"""A run can stop anywhere and go on anywhere, losing nothing.

Everything that a step depends on is on: dropout, clipping, warm-up, a growing batch, accumulation,
evaluation, and a blend of two datasets that are read for more than one epoch. An interrupted run is
compared with one that was left alone: by the bits of each loss and gradient norm and of the last
save at the same layout, to rounding in float64 over changing layouts.
"""

import signal
import subprocess
import time
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch

from megatron.data.indexed_dataset import IndexedDataset
from megatron.training.metrics import METRICS_FILE
from tests.figures import Figure
from tests.integration.runs import (
    SEQ_LENGTH,
    Fault,
    Result,
    base_argv,
    command,
    make_data,
    newest_save,
    options,
    processes_with,
    records,
    run_pretrain,
    values,
)

STEPS = 20
SAMPLES = 120
STOPPED, PEER_LOST = 10, 8
DTYPES = ("fp64", "bf16")
# What float64 leaves of sums that are made in another order.
ROUNDING = 1e-12


def argv(folder: Path, run: str, *, dtype: str = "fp64", **changes: Any) -> list[str]:
    return base_argv(
        folder,
        folder=folder / run,
        data__paths={str(folder / "text"): 0.8, str(folder / "more"): 0.2},
        model__hidden_dropout=0.1,
        model__attention_dropout=0.1,
        train__samples=SAMPLES,
        train__global_batch_size=8,
        train__rampup__start=4,
        train__rampup__increment=4,
        train__rampup__samples=40,
        train__eval_interval=6,
        train__eval_samples=4,
        optimizer__warmup_samples=20,
        optimizer__max_grad_norm=1.0,
        data__split=[90, 10, 0],
        **{"train__dtype": dtype, **changes},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets, and a run of each dtype that was left alone, on two tensor ranks."""
    folder = tmp_path_factory.mktemp("resume")
    make_data(folder / "text")
    make_data(folder / "more", seed=1)
    for dtype in DTYPES:
        result = run_pretrain(argv(folder, dtype, dtype=dtype, parallel__tensor=2), world_size=2)
        assert result.exit_code == 0
        assert len(values(folder / dtype, "loss")) == STEPS
    return folder


def assert_same_bits(run: Path, undisturbed: Path) -> None:
    for name in ("loss_hex", "grad_norm_hex", "learning_rate", "consumed_samples"):
        assert values(run, name) == values(undisturbed, name)
    evaluations = [[record["loss"] for record in records(r, "eval")] for r in (run, undisturbed)]
    assert evaluations[0] == evaluations[1]
    mine, theirs = newest_save(run), newest_save(undisturbed)
    assert mine.state == theirs.state
    assert set(mine.tensors) == set(theirs.tensors)
    for kind, name in mine.tensors:
        assert torch.equal(mine.read(kind, name), theirs.read(kind, name)), (kind, name)


def test_everything_that_matters_is_on(folder: Path) -> None:
    run = folder / "fp64"
    assert set(values(run, "global_batch_size")) == {4, 8}
    assert max(values(run, "grad_norm")) > 1.0
    warmup = values(run, "learning_rate")[:5]
    assert warmup == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.005])
    assert [record["step"] for record in records(run, "eval")] == [6, 12, 18, 20]
    tokens = IndexedDataset(folder / "text").sizes[:36].sum()
    assert tokens < 0.8 * SAMPLES * SEQ_LENGTH, "the run needs more than one epoch"


DEEPSPEED: dict[str, dict[str, Any]] = {
    "ZeRO 3 in bf16": {"train__dtype": "bf16", "parallel__zero": 3},
    "pipeline in fp32": {
        "train__dtype": "fp32",
        "train__micro_batch_size": 1,
        "parallel__zero": 1,
        "parallel__pipeline": 2,
    },
}


@pytest.mark.parametrize("name", DEEPSPEED)
def test_stopped_and_resumed_on_deepspeed_is_the_same_bit_for_bit(
    folder: Path, name: str, figure: Figure
) -> None:
    pytest.importorskip("deepspeed", reason="the package deepspeed is optional")

    def go(run: str, **changes: Any) -> None:
        arguments = argv(folder, run, engine__name="deepspeed", **DEEPSPEED[name], **changes)
        assert run_pretrain(arguments, world_size=2, timeout=240).exit_code == 0

    go(f"{name}, left alone")
    go(f"{name}, stopped", train__stop_at_step=9)
    go(f"{name}, stopped")
    assert_same_bits(folder / f"{name}, stopped", folder / f"{name}, left alone")
    figure(f"resumed on deepspeed, {name}", differing_bits=0, steps=STEPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stopped_twice_and_resumed_is_the_same_bit_for_bit(
    folder: Path, dtype: str, figure: Figure
) -> None:
    run = f"stopped-{dtype}"

    def go(fault: Fault | None = None, **changes: Any) -> Result:
        arguments = argv(folder, run, dtype=dtype, parallel__tensor=2, **changes)
        return run_pretrain(arguments, world_size=2, fault=fault)

    assert go(train__stop_at_step=7).exit_code == 0
    assert len(values(folder / run, "loss")) == 7
    assert go(Fault(13, signal.SIGTERM, rank=1)).exit_code == STOPPED
    assert len(values(folder / run, "loss")) == 13
    last = go()
    assert last.exit_code == 0
    assert "resumed from" in last.stdout
    assert_same_bits(folder / run, folder / dtype)
    figure(f"resume at the same layout, {dtype}", steps=STEPS, stops=2, differing_bits=0)


def test_resumed_at_other_layouts_is_the_same_to_rounding(folder: Path, figure: Figure) -> None:
    def go(world_size: int, fault: Fault | None = None, **changes: Any) -> int:
        arguments = argv(folder, "layouts", **changes)
        return run_pretrain(arguments, world_size=world_size, fault=fault).exit_code

    assert go(2, parallel__tensor=2, train__stop_at_step=5) == 0
    assert go(1, Fault(9, signal.SIGTERM)) == STOPPED
    assert go(4, parallel__tensor=4, parallel__sequence=True, train__stop_at_step=14) == 0
    pipeline: dict[str, Any] = {"parallel__pipeline": 2, "parallel__schedule": "zero_bubble"}
    assert go(2, **pipeline, train__stop_at_step=17) == 0
    assert go(2, parallel__data=2, parallel__zero=3) == 0
    worst = 0.0
    for name in ("loss", "grad_norm"):
        mine, theirs = values(folder / "layouts", name), values(folder / "fp64", name)
        assert mine == pytest.approx(theirs, rel=ROUNDING, abs=0.0)
        worst = max(worst, *(abs(a / b - 1) for a, b in zip(mine, theirs, strict=True)))
    starts = records(folder / "layouts", "start")
    axes = ("tensor", "pipeline", "data", "zero")
    grids = [tuple(start["layout"][axis] for axis in axes) for start in starts]
    assert grids == [(2, 1, 1, 0), (1, 1, 1, 0), (4, 1, 1, 0), (1, 2, 1, 0), (1, 1, 2, 3)]
    names = "TP2 TP1 TP4+SP PP2 DP2+ZeRO3"
    figure("resume at other layouts, fp64", layouts=names, worst_relative=worst)


@pytest.mark.parametrize(
    "fault",
    [Fault(3, signal.SIGTERM, 1), Fault(3, signal.SIGINT, 0), Fault(3, signal.SIGUSR1, 1)],
    ids=lambda fault: fault.signal.name,
)
def test_signal_on_one_rank_lets_all_save_and_leave(folder: Path, fault: Fault) -> None:
    run = folder / fault.signal.name
    arguments = argv(folder, run.name, parallel__tensor=2)
    result = run_pretrain(arguments, world_size=2, fault=fault)
    assert result.exit_codes == [STOPPED, STOPPED]
    assert result.complaints == []
    assert result.stdout.count("stopped on request after step 3, which is saved") == 1
    state = newest_save(run).state
    assert (state["step"], state["consumed_samples"]) == (3, 12)


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_ends_the_other_and_the_run_goes_on(
    folder: Path, rank: int, figure: Figure
) -> None:
    run = f"killed-{rank}"
    arguments = argv(folder, run, parallel__tensor=2, checkpoint__save_interval=4)
    result = run_pretrain(arguments, world_size=2, fault=Fault(10, signal.SIGKILL, rank))
    assert result.exit_codes[rank] == -signal.SIGKILL
    assert result.exit_codes[1 - rank] == PEER_LOST
    assert "another rank was lost" in result.complaints[0]
    assert result.seconds < 20
    assert newest_save(folder / run).state["step"] == 8

    again = run_pretrain(arguments, world_size=2)
    assert again.exit_code == 0
    assert "step-00000008, saved at layout" in again.stdout
    assert_same_bits(folder / run, folder / "fp64")
    figure(f"rank {rank} of 2 killed", other_exit=PEER_LOST, seconds_in_all=result.seconds)


@pytest.mark.parametrize("world_size", [1, 2])
def test_terminated_program_saves_and_leaves(folder: Path, world_size: int) -> None:
    run = folder / f"terminated-{world_size}"
    endless = options(train__samples=100_000)
    arguments = [*argv(folder, run.name, parallel__tensor=world_size), *endless]
    with subprocess.Popen(command(arguments, world_size=world_size), stdout=PIPE) as process:
        try:
            wait_for_step(run, 3)
            process.terminate()
            stdout, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert b"stopped on request after step" in stdout
    assert process.returncode == (STOPPED if world_size == 1 else 1), "torchrun has its own"
    assert newest_save(run).state["step"] == len(values(run, "loss")) >= 3
    assert processes_with(str(folder)) == []


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while not (run / METRICS_FILE).exists() or len(records(run, "step")) < step:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)
