"""The report of whole, resumed, short and damaged runs."""

import base64
import json
import re
import struct
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron.errors import ConfigError, DataError, DiskError
from megatron.report.curves import draw, load_run, smooth, summarize
from megatron.training.metrics import METRICS_FILE, EvalMetrics, MetricsWriter, StepMetrics
from tools.report import main

ROOT = Path(__file__).parents[2]

STEP = StepMetrics(
    step=1,
    consumed_samples=8,
    consumed_tokens=1024,
    loss=5.0,
    learning_rate=1e-3,
    grad_norm=0.5,
    global_batch_size=8,
    skipped=False,
    step_seconds=0.5,
    tokens_per_second=2048.0,
    tflops_per_device=0.0125,
    mfu=None,
    elapsed_seconds=0.5,
    peak_memory_bytes=2**29,
)
INFO = {
    "layout": {"tensor": 2, "data": 1},
    "device": "<b>cpu</b>",
    "parameters": 1_234_567,
    "config": {"model": {"num_layers": 2}},
}


def step_metrics(step: int, start: int) -> StepMetrics:
    return replace(
        STEP,
        step=step,
        consumed_samples=8 * step,
        consumed_tokens=1024 * step,
        loss=2.0 + 3.0 / step,
        elapsed_seconds=0.5 * (step - start),
    )


def write_run(folder: Path, *bounds: int) -> Path:
    """A run of several starts, between the steps ``bounds``; each of them ends with evaluations."""
    folder.mkdir(exist_ok=True)
    for first, last in zip(bounds, bounds[1:], strict=False):
        writer = MetricsWriter(folder, tensorboard=False, enabled=True, resume_step=first)
        writer.write_start(INFO)
        for step in range(first + 1, last + 1):
            writer.write_step(step_metrics(step, first))
        for split, bits in (("valid", 0.875), ("test", None)):
            writer.write_eval(
                EvalMetrics(
                    step=last, consumed_samples=8 * last, split=split, loss=2.5, bits_per_byte=bits
                )
            )
        writer.close()
    return folder


class ResourceFinder(HTMLParser):
    """Collects what a page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.resources: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.resources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def test_a_report_is_one_picture_and_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", 0, 30)
    assert main([str(folder)]) == 0
    paths = [folder / "report.png", folder / "report.html"]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in paths]
    picture = paths[0].read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", picture[16:24])
    assert (width, height) == (1950, 1230)


def test_the_page_holds_the_picture_and_loads_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 0, 30)
    main([str(folder)])
    page = ResourceFinder()
    text = (folder / "report.html").read_text()
    page.feed(text)
    (resource,) = page.resources
    head, _, data = resource.partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == (folder / "report.png").read_bytes()
    assert not re.search(r"https?:|url\(|@import|<script", text)


def test_the_page_escapes_what_the_run_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run<i>", 0, 3)
    main([str(folder)])
    text = (folder / "report.html").read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;cpu&lt;/b&gt;" in text
    assert "<title>run&lt;i&gt;: training report</title>" in text
    assert "num_layers: 2" in text


def test_the_summary_of_a_resumed_run_counts_all_of_it(tmp_path: Path) -> None:
    rows = dict(summarize(load_run(write_run(tmp_path / "run", 0, 40, 70, 100))))
    del rows["Started"]
    assert rows == {
        "Training loss, mean of last 2 steps": f"{2 + 1.5 / 99 + 1.5 / 100:.4f}",
        "Validation loss": "2.5000",
        "Validation perplexity": f"{np.exp(2.5):.4f}",
        "Validation bits per byte": "0.8750",
        "Test loss": "2.5000",
        "Test perplexity": f"{np.exp(2.5):.4f}",
        "Steps": "100",
        "Samples": "800",
        "Tokens": "102,400",
        "Duration": "0:00:50",
        "Resumes": "2",
        "Skipped updates": "0",
        "Tokens/s, median": "2.05k",
        "TFLOP/s per device, median": "0.0125",
        "MFU, median": "n/a",
        "Peak memory": "0.50 GiB",
        "Layout": "tensor 2, data 1",
        "Device": "<b>cpu</b>",
        "Parameters": "1,234,567",
    }


def test_resumes_are_marked_in_every_panel(tmp_path: Path) -> None:
    figure = draw(load_run(write_run(tmp_path / "run", 0, 40, 70, 100)))
    for axes in figure.axes:
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        marks = np.concatenate([np.asarray(line.get_xdata()) for line in dashed])
        np.testing.assert_array_equal(marks, [40, 40, 70, 70])


def test_curves_hold_the_values_of_the_file(tmp_path: Path) -> None:
    figure = draw(load_run(write_run(tmp_path / "run", 0, 30)))
    loss, learning_rate, grad_norm, throughput = figure.axes
    expected = [(loss, 2.0 + 3.0 / np.arange(1, 31)), (learning_rate, np.full(30, 1e-3))]
    expected += [(grad_norm, np.full(30, 0.5)), (throughput, np.full(30, 2048.0))]
    for axes, values in expected:
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), np.arange(1, 31))
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), values)


def test_a_run_of_one_step_has_a_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 0, 1)
    assert main([str(folder)]) == 0


def test_a_run_without_a_finite_loss_has_a_report(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, enabled=True, resume_step=0)
    for step in (1, 2):
        metrics = replace(step_metrics(step, 0), loss=np.nan, grad_norm=np.inf, skipped=True)
        writer.write_step(metrics)
    writer.close()
    run = load_run(tmp_path)
    draw(run)
    rows = dict(summarize(run))
    assert rows["Training loss, mean of last 1 steps"] == "nan"
    assert rows["Skipped updates"] == "2"


def test_the_loss_scale_of_a_run_in_fp16_is_shown(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, enabled=True, resume_step=0)
    for step, scale in ((1, 2.0**30), (2, 2.0**29), (3, 2.0**29)):
        skipped = min(step, 2)
        metrics = replace(step_metrics(step, 0), skipped=step < 3, loss_scale=scale)
        writer.write_step(replace(metrics, skipped_steps=skipped))
    writer.close()
    run = load_run(tmp_path)
    rows = dict(summarize(run))
    assert (rows["Loss scale, last"], rows["Skipped updates"]) == ("5.36871e+08", "2")
    (right,) = [axes for axes in draw(run).axes if axes.get_ylabel() == "loss scale"]
    np.testing.assert_array_equal(right.lines[0].get_ydata(), [2.0**30, 2.0**29, 2.0**29])


def test_the_output_goes_where_it_is_wanted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 0, 3)
    main([str(folder), "--output", str(tmp_path / "a" / "b")])
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "report.html",
        "report.png",
    ]
    assert [path.name for path in folder.iterdir()] == [METRICS_FILE]


def test_a_report_that_is_there_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 0, 3)
    (folder / "report.html").write_text("mine")
    with pytest.raises(ConfigError, match="--output: .*report.html exists already"):
        main([str(folder)])
    assert (folder / "report.html").read_text() == "mine"
    assert main([str(folder), "--overwrite"]) == 0
    assert "<title>" in (folder / "report.html").read_text()


def test_the_run_of_a_save_is_reported(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 0, 3)
    assert main([str(folder / "checkpoints" / "step-00000003")]) == 0
    assert (folder / "report.png").exists()


def test_an_output_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 0, 3)
    with pytest.raises(DiskError, match=r"metrics\.jsonl: cannot be written"):
        main([str(folder), "--output", str(folder / METRICS_FILE)])


def test_a_run_without_steps_is_refused(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text(json.dumps({"event": "start", "step": 0}) + "\n")
    with pytest.raises(DataError, match="must hold at least one finished step"):
        main([str(tmp_path)])


def test_a_step_without_a_field_is_refused(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text(json.dumps({"event": "step", "step": 1}) + "\n")
    with pytest.raises(DataError, match="every step needs a number consumed_tokens"):
        main([str(tmp_path)])


def test_missing_metrics_end_the_tool_with_exit_code_3(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "tools" / "report.py", tmp_path],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 3
    assert result.stderr == (
        f"error: {tmp_path / METRICS_FILE}: cannot be read: No such file or directory\n"
    )


def test_smoothing_is_the_mean_of_the_finite_neighbours() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, np.inf, np.nan, np.nan, 8.0])
    want = [1.5, 1.5, 3.0, 4.0, 4.0, np.nan, 8.0, 8.0]
    np.testing.assert_array_equal(smooth(values, 1), want)


def test_smoothing_of_a_line_keeps_its_middle() -> None:
    values = np.arange(20.0)
    np.testing.assert_array_equal(smooth(values, 3)[3:-3], values[3:-3])
    np.testing.assert_array_equal(smooth(values, 0), values)
