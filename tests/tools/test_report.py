"""The report of whole, resumed, short and damaged runs."""

import base64
import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.errors import ConfigError, DataError, DiskError
from megatron.report.page import changed_options, describe_starts, render_page, summarize, thin
from megatron.report.panels import smooth
from megatron.report.picture import draw
from megatron.report.runs import Run, load_runs
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
INFO: dict[str, Any] = {
    "world_size": 2,
    "layout": {"tensor": 2, "data": 1},
    "device": "<b>cpu</b>",
    "parameters": 1_234_567,
    "config": {"model": {"num_layers": 2}, "engine": {"name": "torch"}},
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


def write_run(folder: Path, *bounds: int, infos: Sequence[Mapping[str, Any]] = ()) -> Path:
    """A run of several starts, between the steps ``bounds``; each of them ends with evaluations.

    Args:
        infos: what the starts tell of the run, in their order.
    """
    folder.mkdir(exist_ok=True, parents=True)
    for number, (first, last) in enumerate(pairwise(bounds)):
        writer = MetricsWriter(folder, tensorboard=False, enabled=True, resume_step=first)
        writer.write_start(infos[number] if infos else INFO)
        for step in range(first + 1, last + 1):
            writer.write_step(step_metrics(step, first))
        for split, bits in (("valid", 0.875), ("test", None)) if last > first else ():
            writer.write_eval(
                EvalMetrics(
                    step=last, consumed_samples=8 * last, split=split, loss=2.5, bits_per_byte=bits
                )
            )
        writer.close()
    return folder


def load(folder: Path) -> Run:
    (run,) = load_runs([folder])
    return run


def with_config(**options: Any) -> dict[str, Any]:
    """What a start tells whose config has ``options`` in its section optimizer."""
    return {**INFO, "config": {**INFO["config"], "optimizer": options}}


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
    assert not re.search(r"https?:|url\(|@import|import\(|fetch|XMLHttp|innerHTML", text)
    assert "default-src 'none'" in text


def test_the_page_escapes_what_the_run_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run<i>", 0, 3)
    main([str(folder)])
    text = (folder / "report.html").read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;cpu&lt;/b&gt;" in text
    assert "<title>run&lt;i&gt;: training report</title>" in text
    assert "num_layers: 2" in text


def test_the_summary_of_a_resumed_run_counts_all_of_it(tmp_path: Path) -> None:
    rows = summarize(load(write_run(tmp_path / "run", 0, 40, 70, 100)))
    assert rows == {
        "Training loss, mean of last 20 steps": f"{2 + np.mean(3 / np.arange(81.0, 101)):.4f}",
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
        "Parameters": "1,234,567",
    }


def test_resumes_are_marked_in_every_panel(tmp_path: Path) -> None:
    figure = draw([load(write_run(tmp_path / "run", 0, 40, 70, 100))])
    assert len(figure.axes) == 4
    for axes in figure.axes:
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        marks = np.concatenate([np.asarray(line.get_xdata()) for line in dashed])
        np.testing.assert_array_equal(marks, [40, 40, 70, 70])


def test_curves_hold_the_values_of_the_file(tmp_path: Path) -> None:
    figure = draw([load(write_run(tmp_path / "run", 0, 30))])
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
    run = load(tmp_path)
    draw([run])
    rows = summarize(run)
    assert rows["Training loss, mean of last 20 steps"] == "nan"
    assert rows["Skipped updates"] == "2"


def test_the_loss_scale_of_a_run_in_fp16_is_shown(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, enabled=True, resume_step=0)
    for step, scale in ((1, 2.0**30), (2, 2.0**29), (3, 2.0**29)):
        skipped = min(step, 2)
        metrics = replace(step_metrics(step, 0), skipped=step < 3, loss_scale=scale)
        writer.write_step(replace(metrics, skipped_steps=skipped))
    writer.close()
    run = load(tmp_path)
    rows = summarize(run)
    assert (rows["Loss scale, last"], rows["Skipped updates"]) == ("5.36871e+08", "2")
    (scale,) = [axes for axes in draw([run]).axes if axes.get_title("left") == "Loss scale"]
    np.testing.assert_array_equal(scale.lines[0].get_ydata(), [2.0**30, 2.0**29, 2.0**29])


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
    with pytest.raises(DiskError, match=r"metrics\.jsonl: cannot be made"):
        main([str(folder), "--output", str(folder / METRICS_FILE)])


def test_a_run_without_steps_is_refused(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text(json.dumps({"event": "start", "step": 0}) + "\n")
    with pytest.raises(DataError, match="must hold at least one finished step"):
        main([str(tmp_path)])


def test_a_step_without_a_field_is_refused(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text(json.dumps({"event": "step", "step": 1}) + "\n")
    with pytest.raises(DataError, match="every step needs a number loss"):
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


def test_every_start_tells_its_layout_its_steps_and_what_changed(tmp_path: Path) -> None:
    second = {**with_config(lr=0.02), "layout": {"tensor": 1, "data": 1}, "world_size": 1}
    folder = write_run(tmp_path / "run", 0, 40, 70, infos=[with_config(lr=0.01), second])
    shown = ("Steps", "Layout", "World size", "Engine", "Changed options")
    assert [tuple(start[label] for label in shown) for start in describe_starts(load(folder))] == [
        ("1 to 40", "tensor 2, data 1", "2", "torch", ""),
        (
            "41 to 70",
            "tensor 1, data 1",
            "1",
            "torch",
            "optimizer.lr 0.01 \N{RIGHTWARDS ARROW} 0.02",
        ),
    ]


def test_starts_that_did_nothing_are_no_resumes(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "run", 0, 40, 40, 70, 70))
    assert run.resumes == [40]
    assert summarize(run)["Resumes"] == "1"
    steps = [start["Steps"] for start in describe_starts(run)]
    assert steps == ["1 to 40", "none", "41 to 70", "none"]
    assert summarize(run)["Duration"] == "0:00:35"


def test_steps_that_were_made_again_count_for_the_start_that_made_them_last(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "run", 0, 40, 70))
    write_run(tmp_path / "run", 40, 100)
    run = load(tmp_path / "run")
    assert [start["Steps"] for start in describe_starts(run)] == ["1 to 40", "none", "41 to 100"]
    assert len(run.steps) == 100


def test_options_are_told_that_are_not_at_their_defaults_or_differ(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", 0, 3, infos=[with_config(lr=0.5, beta1=0.9, beta2=0.95)])
    two = write_run(tmp_path / "two", 0, 3, infos=[with_config(lr=0.5, beta1=0.8, beta2=0.95)])
    told = {option.name: option for option in changed_options(load_runs([one, two]))}
    assert list(told) == ["model.num_layers", "optimizer.lr", "optimizer.beta1"]
    assert (told["optimizer.lr"].told, told["optimizer.lr"].differs) == (["0.5", "0.5"], False)
    assert (told["optimizer.beta1"].told, told["optimizer.beta1"].differs) == (["0.9", "0.8"], True)
    assert told["optimizer.beta1"].default == "0.9"


def test_several_runs_are_laid_over_each_other_and_side_by_side(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "one", 0, 30), write_run(tmp_path / "two", 0, 20, 50)]
    figure = draw(load_runs(folders))
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines if line.get_linestyle() == "-"] == [
            "one",
            "two",
        ]
        assert axes.get_xlim()[1] >= 50
    assert main([*map(str, folders), "--output", str(tmp_path / "both")]) == 0
    page = ResourceFinder()
    page.feed((tmp_path / "both" / "report.html").read_text())
    text = [word for word in page.text if word]
    assert text[text.index("Steps") :][:3] == ["Steps", "30", "50"]
    assert text[text.index("Resumes") :][:3] == ["Resumes", "0", "1"]


def test_several_runs_need_a_folder_for_their_report(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "one", 0, 3), write_run(tmp_path / "two", 0, 3)]
    with pytest.raises(ConfigError, match="the report of several runs needs --output"):
        main([*map(str, folders)])


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a" / "run", 0, 3), write_run(tmp_path / "b" / "run", 0, 3)]
    assert [run.name for run in load_runs(folders)] == [str(folder) for folder in folders]


def test_the_legend_hides_no_curve(tmp_path: Path) -> None:
    figure = draw([load(write_run(tmp_path / "run", 0, 40, 100))])
    figure.canvas.draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "training, each step",
        "training",
        "validation",
        "test",
        "resumed",
    ]
    for axes in figure.axes:
        assert axes.get_legend() is None
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())


@pytest.mark.parametrize("name", ["_run", "a $x^ run", "</script><b>", "x" * 200])
def test_any_name_of_a_run_is_shown_as_it_is(name: str, tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name.replace("/", "|"), 0, 3), write_run(tmp_path / "b", 0, 3)]
    runs = load_runs(folders)
    runs[0] = replace(runs[0], name=name)
    figure = draw(runs)
    figure.canvas.draw()
    assert name in [text.get_text() for text in figure.legends[0].get_texts()]
    text = render_page(runs, b"")
    assert "<b>" not in text
    assert text.count("</script>") == 2


def test_a_long_curve_keeps_its_ends_of_each_stretch() -> None:
    x, y = np.arange(50_000.0), np.zeros(50_000)
    y[12_345], y[33_333], y[40_000:41_000] = 7.0, -7.0, np.nan
    few, values = thin(x, y)
    assert len(few) <= 3000
    assert (few[values == 7.0], few[values == -7.0]) == (12_345, 33_333)
    assert np.isnan(values).any()
    np.testing.assert_array_equal(few, np.unique(few))


@pytest.mark.skipif(shutil.which("node") is None, reason="nothing runs the script of the page")
def test_the_script_reads_values_and_looks_closer(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 0, 60)
    main([str(folder)])
    done = subprocess.run(
        ["node", ROOT / "tests/tools/page_user.js", folder / "report.html"],
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(done.stdout)
    assert seen["picture hidden"]
    assert seen["steps at first"] == ["0", "10", "20", "30", "40", "50", "60"]
    assert seen["words"] == ["step 30", "training 2.1"]
    assert seen["steps closer"] == ["15", "20", "25", "30", "35", "40", "45"]
    assert seen["steps after Escape"] == seen["steps at first"]
    assert seen["steps after a double click"] == seen["steps at first"]


def test_smoothing_is_the_mean_of_the_finite_neighbours() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, np.inf, np.nan, np.nan, 8.0])
    want = [1.5, 1.5, 3.0, 4.0, 4.0, np.nan, 8.0, 8.0]
    np.testing.assert_array_equal(smooth(values, 1), want)


def test_smoothing_of_a_line_keeps_its_middle() -> None:
    values = np.arange(20.0)
    np.testing.assert_array_equal(smooth(values, 3)[3:-3], values[3:-3])
    np.testing.assert_array_equal(smooth(values, 0), values)
