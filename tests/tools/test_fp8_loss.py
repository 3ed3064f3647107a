"""The benchmark of losses in fp8: what it writes, and what it compares."""

from pathlib import Path

import pytest

from megatron.benchmarks import fp8_loss
from megatron.benchmarks.curves import read_samples
from megatron.benchmarks.fp8_loss import FULL, HELD_OUT, VARIANTS
from megatron.benchmarks.result import read_result

pytest.importorskip("torchao", reason="torchao, of the extra fp8, is not installed")


@pytest.mark.slow
def test_three_runs_are_compared_and_drawn(tmp_path: Path) -> None:
    results, figure = tmp_path / "result.json", tmp_path / "figure.png"
    assert fp8_loss.main(["--quick", "--json", str(results), "--figure", str(figure)]) == 0
    result = read_result(results)
    summary, points = result.tables
    assert result.environment["torchao"].startswith("0.")
    assert [row["run"] for row in summary.rows] == list(VARIANTS)
    assert [row["up to step"] for row in points.rows] == [2, 4]
    first = points.rows[0]
    # The first loss is of the same weights; it differs by the rounding of fp8, and hardly more.
    assert first["bf16"] != first["bf16 + fp8"]
    assert first["bf16 + fp8"] == pytest.approx(first["bf16"], rel=0.01)
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_no_run_trains_on_what_is_held_out() -> None:
    samples = read_samples(FULL.model.seq_length)
    assert FULL.steps * FULL.batch <= len(samples) - HELD_OUT
