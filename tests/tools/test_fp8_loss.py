"""The benchmark of losses in fp8: what it writes, and what it compares."""

from pathlib import Path

import pytest
import torch

from tools.benchmarks import fp8_loss
from tools.benchmarks.fp8_loss import FULL, HELD_OUT, VARIANTS, Curve, microbatch, read_samples
from tools.benchmarks.result import read_result

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


def test_points_are_means_of_equal_intervals() -> None:
    curve = Curve((1.0, 3.0, 5.0, 7.0, 9.0), held_out=0.0)
    assert curve.means(2) == [2, 6, 9]


def test_no_run_trains_on_what_is_held_out() -> None:
    samples = read_samples(FULL.model.seq_length)
    assert FULL.steps * FULL.batch <= len(samples) - HELD_OUT


def test_each_byte_predicts_the_next() -> None:
    samples = read_samples(16)
    batch = microbatch(samples, range(3, 5))
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert torch.equal(batch.targets[:, -1], samples[3:5, -1])
    assert batch.samples.tolist() == [3, 4]
