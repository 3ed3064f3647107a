"""Starts of one run folder at the same time: one trains, the others are refused, nothing is lost.

They are on two machines, as far as the lock of the folder can tell (``machines.py``).
"""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron.training import trainer
from megatron.training.metrics import METRICS_FILE, read_metrics
from megatron.training.run_lock import LOCK_FILE
from tests.figures import Figure
from tests.integration.machines import PATIENCE, be_on
from tests.integration.runs import (
    Fault,
    Result,
    base_argv,
    contents,
    make_data,
    newest_save,
    run_pretrain,
    values,
)

STARTS = 20
STEPS = 12
HELD, DISK, STOPPED = 2, 5, 10


def argv(folder: Path, run: str) -> list[str]:
    return base_argv(
        folder,
        folder=folder / run,
        train__samples=4 * STEPS,
        checkpoint__save_interval=3,
        model__hidden_dropout=0.1,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a run that was left alone."""
    folder = tmp_path_factory.mktemp("two")
    make_data(folder / "text")
    assert run_pretrain(argv(folder, "alone")).exit_code == 0
    return folder


def start_at_once(folder: Path, run: str, step: int, fault: Fault | None = None) -> list[Result]:
    """Twenty starts on two machines. The one that trains waits at ``step`` for the others' end."""
    go_on = folder / f"{run}, go on from {step}"
    ended: list[Result] = []

    def begin(number: int) -> None:
        machine = f"node{number % 2}"
        prepare = partial(be_on, machine, step, go_on)
        ended.append(run_pretrain(argv(folder, run), prepare=prepare, fault=fault))
        if len(ended) == STARTS - 1:
            go_on.touch()

    with ThreadPoolExecutor(STARTS) as pool:
        list(pool.map(begin, range(STARTS)))
    return ended


def assert_same_bits(run: Path, alone: Path) -> None:
    for name in ("loss_hex", "grad_norm_hex", "consumed_samples"):
        assert values(run, name) == values(alone, name)
    mine, theirs = newest_save(run).path, newest_save(alone).path
    name = "rank-00000.safetensors"
    assert (mine / name).read_bytes() == (theirs / name).read_bytes()


def test_one_of_twenty_starts_trains(folder: Path, figure: Figure) -> None:
    run = folder / "many"
    killed = start_at_once(folder, run.name, 5, Fault(8, signal.SIGKILL))
    assert sorted(result.exit_code for result in killed) == [-signal.SIGKILL] + 19 * [HELD]
    assert newest_save(run).state["step"] == 6
    steps = [r["step"] for r in read_metrics(run / METRICS_FILE) if r["event"] == "step"]
    assert steps == list(range(1, 9)), "no line was lost"

    again = start_at_once(folder, run.name, 9)
    assert sorted(result.exit_code for result in again) == [0] + 19 * [HELD]
    (trained,) = [result for result in again if result.exit_code == 0]
    assert " over from process " in trained.stderr
    assert "step-00000006, saved at layout" in trained.stdout
    assert_same_bits(run, folder / "alone")
    cut = read_metrics(run / "metrics-cut-0001.jsonl")
    assert [r["step"] for r in cut if r["event"] == "step"] == [7, 8]
    refused = [result for result in killed + again if result.exit_code == HELD]
    for result in refused:
        assert len(result.complaints) == 1, result.stderr
        assert f"folder {run} is held by another run: process " in result.complaints[0]
        assert " on host node" in result.complaints[0]
    assert not (run / LOCK_FILE).exists()
    figure("simultaneous starts", starts=2 * STARTS, trained=2, refused=len(refused), lost_lines=0)


@pytest.mark.parametrize("machine", ["node0", "node1"])
def test_start_is_refused_on_all_its_ranks_and_changes_nothing(folder: Path, machine: str) -> None:
    run = folder / f"held, {machine}"
    with ThreadPoolExecutor(1) as pool:
        go_on = folder / f"{run.name}, go on"
        prepare = partial(be_on, "node0", 4, go_on)
        first = pool.submit(run_pretrain, argv(folder, run.name), prepare=prepare)
        while not (run / "checkpoints/step-00000003").exists() or last_step(run) < 4:
            assert not first.done()
        before = contents(run)
        prepare = partial(be_on, machine)
        second = run_pretrain(argv(folder, run.name), world_size=2, prepare=prepare)
        after = contents(run)
        go_on.touch()
        assert first.result().exit_code == 0
    assert second.exit_codes == [HELD, HELD]
    assert len(second.complaints) == 1
    # The holder goes on showing that it lives.
    lock = str(run / LOCK_FILE)
    assert before.pop(lock) != after.pop(lock)
    assert before == after
    assert_same_bits(run, folder / "alone")


def last_step(run: Path) -> int:
    try:
        return max(record["step"] for record in read_metrics(run / METRICS_FILE))
    except Exception:
        return 0


def test_suspended_run_that_was_taken_over_ends_before_it_writes(folder: Path) -> None:
    run = folder / "suspended"
    with ThreadPoolExecutor(1) as pool:
        prepare = partial(be_on, "node0")
        fault = Fault(4, signal.SIGSTOP)
        first = pool.submit(run_pretrain, argv(folder, run.name), prepare=prepare, fault=fault)
        while last_step(run) < 4:
            assert not first.done()
        second = run_pretrain(argv(folder, run.name), prepare=partial(be_on, "node1"))
        assert second.exit_code == 0, second.stderr
        assert f"waiting up to {PATIENCE:g} s for a sign of life of process" in second.stdout
        before = contents(run)
        pid = int(second.stderr.partition(" over from process ")[2].split()[0])
        os.kill(pid, signal.SIGCONT)
        lost = first.result()
    assert lost.exit_code == DISK
    assert len(lost.complaints) == 1
    assert f"folder {run}: this run has lost it" in lost.complaints[0]
    assert contents(run) == before
    assert_same_bits(run, folder / "alone")


@pytest.mark.parametrize("world_size", [1, 2])
def test_lock_is_given_back_at_every_end(folder: Path, world_size: int) -> None:
    run = folder / f"ends {world_size}"
    arguments = argv(folder, run.name)
    for fault in (Fault(2, signal.SIGTERM), Fault(5, signal.SIGINT), None):
        run_pretrain(arguments, world_size=world_size, fault=fault)
        assert not (run / LOCK_FILE).exists()
    refused = run_pretrain([*arguments, "--model.num_layers", "3"], world_size=world_size)
    assert refused.exit_code == 4
    assert not (run / LOCK_FILE).exists()
    assert len(values(run, "loss")) == STEPS


def stop_in_the_start() -> None:
    """Let rank 0 be asked to stop while it waits, inside torch, for the data of rank 1."""
    if os.environ["RANK"] == "0":
        threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return
    read = trainer.read_data

    def read_slowly(*args: Any, **options: Any) -> Any:
        time.sleep(6.0)
        return read(*args, **options)

    setattr(trainer, "read_data", read_slowly)  # noqa: B010


def test_lock_is_given_back_by_a_start_that_is_stopped_inside_torch(folder: Path) -> None:
    run = folder / "stopped in the start"
    result = run_pretrain(argv(folder, run.name), world_size=2, prepare=stop_in_the_start)
    assert result.exit_codes[0] == STOPPED, result.stderr
    assert not run.exists()
