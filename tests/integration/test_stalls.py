"""A rank that stops answering ends the others within ``launch.timeout`` and a few seconds.

It is stopped (SIGSTOP) before one of its own exchanges with other ranks, in a step, an evaluation,
a replica check, a save or a load. In each place the number of exchanges to let pass is drawn, so
that over many cases all of them are met: gradients, hidden states of the pipeline, outcomes, files.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron.training import trainer
from megatron.training.saving import RunCheckpoints
from tests.figures import Figure
from tests.integration.runs import TIMEOUT, base_argv, make_data, run_pretrain

PEER_LOST = 8
WAIT = 4.0
"""launch.timeout of the runs."""
MOST_OVER = 5.0
PATIENCE = 4 * TIMEOUT
"""Eight ranks, or DeepSpeed, are slow to start."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 2": {"parallel__tensor": 2},
    "data 2": {"parallel__data": 2, "parallel__zero": 1},
    "data 2, ZeRO 3": {"parallel__data": 2, "parallel__zero": 3},
    "pipeline 2": {"parallel__pipeline": 2},
    "data 2 on deepspeed": {
        "parallel__data": 2,
        "parallel__zero": 2,
        "engine__name": "deepspeed",
        "train__dtype": "fp32",
    },
    "all": {"parallel__tensor": 2, "parallel__data": 2, "parallel__pipeline": 2},
}
# Where the rank is stopped, at which call of it, and after how many exchanges at most.
PLACES: dict[str, tuple[Any, str, int, int]] = {
    "step 2": (trainer._Run, "_step", 2, 3),
    "the evaluation after step 2": (trainer._Run, "_evaluate", 1, 1),
    "the replica check after step 2": (trainer._Run, "_check_replicas", 1, 1),
    "the save of step 2": (RunCheckpoints, "save", 1, 3),
    "loading": (RunCheckpoints, "resume", 1, 1),
}
EXCHANGES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "barrier",
    "broadcast",
    "irecv",
    "isend",
    "recv",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "send",
)


@dataclass(frozen=True)
class Stall:
    """``rank`` is stopped in ``place``, after it has exchanged ``passed`` times there."""

    layout: str
    place: str
    rank: int
    passed: int
    stopped: Path

    def arm(self) -> None:
        owner, name, call, _ = PLACES[self.place]
        calls, inside, exchanges = [0], [False], [0]
        whole = getattr(owner, name)

        def enter(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            inside[0] = calls[0] == call
            try:
                return whole(*args, **kwargs)
            finally:
                if inside[0]:
                    # No exchange was left to stop at.
                    self._stop()

        def counting(exchange: Callable[..., Any]) -> Callable[..., Any]:
            def count(*args: Any, **kwargs: Any) -> Any:
                if inside[0]:
                    if exchanges[0] == self.passed:
                        self._stop()
                    exchanges[0] += 1
                return exchange(*args, **kwargs)

            return count

        setattr(owner, name, enter)
        for exchange in EXCHANGES:
            if hasattr(dist, exchange):
                setattr(dist, exchange, counting(getattr(dist, exchange)))

    def _stop(self) -> None:
        self.stopped.write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGSTOP)


def cases(folder: Path, seed: int) -> list[Stall]:
    """Each rank of each layout in each place."""
    drawn = random.Random(seed)
    return [
        Stall(
            layout,
            place,
            rank,
            drawn.randint(0, PLACES[place][3]),
            folder / f"{layout} {place} {rank}",
        )
        for layout in LAYOUTS
        for place in PLACES
        for rank in range(_world_size(layout))
    ]


def _world_size(layout: str) -> int:
    return 8 if layout == "all" else 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a run of one step to go on from."""
    folder = tmp_path_factory.mktemp("stalls")
    make_data(folder / "text")
    argv = arguments(folder, folder / "saved", train__stop_at_step=1)
    assert run_pretrain(argv).exit_code == 0
    return folder


def arguments(folder: Path, run: Path, **changes: Any) -> list[str]:
    return base_argv(
        folder,
        folder=run,
        train__samples=40,
        train__global_batch_size=8,
        train__micro_batch_size=1,
        train__eval_interval=2,
        train__eval_samples=4,
        checkpoint__save_interval=2,
        data__split=[0.8, 0.2, 0.0],
        launch__timeout=WAIT,
        **changes,
    )


def overrun(folder: Path, stall: Stall) -> float:
    """Seconds after the timeout at which the last of the others has ended; all is checked."""
    run = stall.stopped.with_name(f"run {stall.stopped.name}")
    if stall.place == "loading":
        shutil.copytree(folder / "saved", run)
    world_size = _world_size(stall.layout)
    result = run_pretrain(
        arguments(folder, run, **LAYOUTS[stall.layout]),
        world_size=world_size,
        fault=stall,
        stalled=[stall.rank],
        timeout=PATIENCE,
    )
    others = [code for rank, code in enumerate(result.exit_codes) if rank != stall.rank]
    assert others == [PEER_LOST] * (world_size - 1), (stall, result.exit_codes, result.stderr)
    said = [line for line in result.complaints if "another rank was lost or did not" in line]
    assert len(said) == len(result.complaints) == 1, (stall, result.stderr)
    # Who waits for it may have gone on from there until it needs it.
    assert f"in {stall.place}" in said[0] or stall.passed > 0, (stall, said[0])
    assert " in " in said[0].partition("did not answer")[2], said[0]
    assert ".cc:" not in said[0]
    return result.ended - float(stall.stopped.read_text()) - WAIT


def measure(folder: Path, stalls: list[Stall], figure: Figure, at_once: int) -> None:
    """Some at once: they do little but wait."""
    with ThreadPoolExecutor(at_once) as pool:
        overruns = list(pool.map(lambda stall: overrun(folder, stall), stalls))
    figure("stalled ranks", cases=len(stalls), worst_overrun_seconds=max(overruns))
    worst = max(zip(overruns, stalls, strict=True), key=lambda pair: pair[0])
    assert worst[0] < MOST_OVER, worst


def test_stalled_rank_ends_the_others_in_time(folder: Path, tmp_path: Path, figure: Figure) -> None:
    small = [stall for stall in cases(tmp_path, seed=0) if _world_size(stall.layout) == 2]
    small = [stall for stall in small if "deepspeed" not in stall.layout]
    places: dict[str, Stall] = {}
    for stall in random.Random(1).sample(small, len(small)):
        places.setdefault(stall.place, stall)
    measure(folder, list(places.values()), figure, at_once=5)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_that_stalls_ends_the_others_in_time(
    layout: str, seed: int, folder: Path, tmp_path: Path, figure: Figure
) -> None:
    if "deepspeed" in layout:
        pytest.importorskip("deepspeed")
    stalls = [stall for stall in cases(tmp_path, seed) if stall.layout == layout]
    slow = layout == "all" or "deepspeed" in layout
    measure(folder, stalls, figure, at_once=1 if slow else 4)
