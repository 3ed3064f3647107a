"""The benchmark of the engine: its contenders do the same work, and its bounds are theory."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from megatron.benchmarks import overhead
from megatron.benchmarks.contenders import Shape, draw_tokens
from megatron.benchmarks.measure import Times
from megatron.benchmarks.overhead import PROCESS, QUICK, SCHEDULES, idle_share
from megatron.benchmarks.ranks import run_alone
from megatron.benchmarks.result import read_result
from megatron.launch import Launch
from tests.figures import Figure

SHAPE: Shape = QUICK[0]


@pytest.mark.slow
def test_loops_and_schedules_are_timed(tmp_path: Path, figure: Figure) -> None:
    path = tmp_path / "result.json"
    assert overhead.main(["--quick", "--json", str(path)]) == 0
    loops, schedules = read_result(path).tables
    (row,) = loops.rows
    figure("engine beside a bare loop, tiny", speed_ratio=float(str(row["speed ratio"])))
    assert [row["schedule"] for row in schedules.rows] == list(SCHEDULES)
    assert {row["one process, s"] for row in schedules.rows} == {
        schedules.rows[0]["one process, s"]
    }


def test_idle_shares_are_those_of_theory() -> None:
    shares = {name: idle_share(parallel, 4) for name, parallel in SCHEDULES.items()}
    # Of 4 microbatches in 2 passes, of 8 half as long, and of 4 in 3 passes.
    assert shares == {"1f1b": 2 / 8, "interleaved_1f1b": 2 / 16, "zero_bubble": 1 / 12}
    assert idle_share(SCHEDULES["1f1b"], 8) == 1 / 8


def test_bound_is_half_of_one_process_and_the_idle_share() -> None:
    times = {PROCESS: Times((8.0, 9.0)), **{name: Times((6.0, 6.0)) for name in SCHEDULES}}
    rows = {row["schedule"]: row for row in overhead.rows_of_schedules(SHAPE, times)}
    assert rows["1f1b"]["bound, s"] == 8 * 1.25 / 2
    assert rows["1f1b"]["bound / time"] == 5 / 6
    assert rows["1f1b"]["idle share"] == "25.0%"


def test_speed_ratio_is_above_one_where_the_engine_is_faster() -> None:
    times = {"engine": Times((2.0, 2.0)), "bare": Times((3.0, 3.0))}
    row = overhead.row_of_loop(SHAPE, times)
    assert row["speed ratio"] == 1.5
    assert row["engine, tokens/s"] == SHAPE.tokens / 2


def losses_of_both(launch: Launch, shape: Shape) -> tuple[list[float], list[float]]:
    """Losses of three steps of the bare loop and of the engine."""
    bare, engine = overhead.build_loops(launch, shape).values()
    tokens = draw_tokens(shape, launch.device)
    return [bare(tokens) for _ in range(3)], [engine(tokens) for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-3)])
def test_bare_loop_learns_what_the_engine_learns(
    dtype: Literal["fp32", "bf16"], tolerance: float
) -> None:
    shape = replace(SHAPE, dtype=dtype)
    bare, engine = run_alone(losses_of_both, shape)
    # The bare loop lets biases and norms decay too; its float32 weights begin as those in bf16.
    assert bare[0] == pytest.approx(engine[0], rel=1e-6)
    assert bare == pytest.approx(engine, rel=tolerance)
    assert bare[0] > bare[1] > bare[2]
