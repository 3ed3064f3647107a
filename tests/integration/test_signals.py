"""A signal that asks to stop is heard from the start of a process on, whatever it waits in."""

import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

import megatron.launch
from megatron.stopping import NOTHING_CHANGED
from megatron.training import trainer
from tests.figures import Figure
from tests.integration.runs import base_argv, command, make_data, run_pretrain

PEER_LOST, STOPPED = 8, 10
MOST_SECONDS = 12.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    make_data(folder / "text")
    # The server that ranks are forked from takes its time to start.
    assert run_pretrain(["--help"]).exit_code == 0
    return folder


@dataclass(frozen=True)
class Signal:
    """A signal that ``rank`` gets when it is about to call ``place``, or a moment later."""

    number: signal.Signals
    place: str
    rank: int = 1
    later: float = 0.0

    def arm(self) -> None:
        owner: Any = megatron.launch if hasattr(megatron.launch, self.place) else trainer
        whole = getattr(owner, self.place)

        def send_and_call(*args: Any, **kwargs: Any) -> Any:
            if self.later:
                threading.Timer(self.later, os.kill, (os.getpid(), self.number)).start()
            else:
                os.kill(os.getpid(), self.number)
            return whole(*args, **kwargs)

        setattr(owner, self.place, send_and_call)


PLACES = [
    (signal.SIGTERM, "_choose_device"),
    (signal.SIGINT, "meet"),
    (signal.SIGUSR1, "build_groups"),
    (signal.SIGHUP, "open_newest"),
    (signal.SIGTERM, "build_engine"),
]
CASES: list[Any] = [
    pytest.param(*place, rank, marks=[pytest.mark.nightly] if (at + rank) % 2 else [])
    for at, place in enumerate(PLACES)
    for rank in (0, 1)
]


@pytest.mark.parametrize(("number", "place", "rank"), CASES, ids=str)
def test_signal_at_the_start_ends_all_ranks(
    number: signal.Signals, place: str, rank: int, folder: Path, tmp_path: Path, figure: Figure
) -> None:
    """By no launcher that would end the other rank, which is not silent for long."""
    result = run_pretrain(
        base_argv(folder, folder=tmp_path / "run"),
        world_size=2,
        fault=Signal(number, place, rank),
    )
    assert result.exit_codes[rank] == STOPPED, result.stderr
    assert result.exit_codes[1 - rank] in (PEER_LOST, STOPPED)
    assert result.stdout.count(NOTHING_CHANGED) == 1
    assert result.complaints == []
    assert result.seconds < MOST_SECONDS
    figure("signals at the start", seconds=result.seconds)


def test_rank_that_waits_for_another_hears_a_signal(folder: Path, tmp_path: Path) -> None:
    """It waits inside torch, where Python runs no handlers."""
    result = run_pretrain(
        base_argv(folder, folder=tmp_path / "run"),
        world_size=2,
        ranks=[0],
        fault=Signal(signal.SIGTERM, "meet", rank=0, later=0.5),
    )
    assert result.exit_code == STOPPED
    assert result.stdout.count(NOTHING_CHANGED) == 1
    assert result.complaints == []
    assert result.seconds < MOST_SECONDS


def test_process_hears_a_signal_before_it_has_imported_torch(folder: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        command(base_argv(folder, folder=tmp_path / "run")), stdout=PIPE, stderr=PIPE, text=True
    ) as process:
        wait_for_handler(process.pid, signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == STOPPED, stderr
    assert stdout.endswith(f"{NOTHING_CHANGED}\n")
    assert stderr == ""
    assert not (tmp_path / "run").exists()


def wait_for_handler(process: int, number: signal.Signals) -> None:
    """Wait until ``process`` handles a signal, as the kernel tells."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("SigCgt:") and int(line.split()[1], 16) >> (number - 1) & 1:
                return
        time.sleep(0.01)
    pytest.fail(f"no handler of {number}")
