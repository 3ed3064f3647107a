"""metrics.jsonl as strict JSON, its repair on resume, the averages and the log line."""

import json
import math
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.data.summary import DatasetSummary
from megatron.errors import ConfigError, DataError, DiskError
from megatron.training.metrics import (
    METRICS_FILE,
    EvalMetrics,
    MetricsWriter,
    StepMetrics,
    Window,
    data_lines,
    duration,
    eval_line,
    log_line,
    read_metrics,
    short_number,
)

STEP = StepMetrics(
    step=1,
    consumed_samples=256,
    consumed_tokens=524_288,
    loss=3.25,
    learning_rate=3e-4,
    grad_norm=0.5,
    global_batch_size=256,
    skipped=False,
    step_seconds=2.0,
    tokens_per_second=262_144.0,
    tflops_per_device=151.2,
    mfu=0.485,
    elapsed_seconds=2.5,
    peak_memory_bytes=2**30,
)
EVAL = EvalMetrics(step=1, consumed_samples=256, split="valid", loss=2.0, bits_per_byte=0.75)


def open_writer(folder: Path, resume_step: int = 0) -> MetricsWriter:
    return MetricsWriter(folder, tensorboard=False, enabled=True, resume_step=resume_step)


def write_steps(folder: Path, first: int, last: int) -> None:
    """Run from a save at step ``first - 1`` to the end of step ``last``."""
    writer = open_writer(folder, resume_step=first - 1)
    writer.write_start({"device": "cpu"})
    for step in range(first, last + 1):
        writer.write_step(replace(STEP, step=step))
        writer.write_eval(replace(EVAL, step=step))
    writer.close()


def events(folder: Path) -> list[tuple[str, int]]:
    return [(record["event"], record["step"]) for record in read_metrics(folder / METRICS_FILE)]


def refuse_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def test_every_field_of_a_step_is_written(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    writer.write_step(STEP)
    writer.close()
    (record,) = read_metrics(tmp_path / METRICS_FILE)
    exact = {"loss_hex": "0x1.a000000000000p+1", "grad_norm_hex": "0x1.0000000000000p-1"}
    assert record == {"event": "step", **vars(STEP), **exact}


def test_an_evaluation_is_written_with_its_perplexity(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    writer.write_eval(EVAL)
    writer.close()
    (record,) = read_metrics(tmp_path / METRICS_FILE)
    assert record == {"event": "eval", **vars(EVAL), "perplexity": math.exp(2.0)}


def test_a_start_is_written_with_what_the_caller_tells(tmp_path: Path) -> None:
    writer = open_writer(tmp_path, resume_step=7)
    writer.write_start({"layout": {"tensor": 2}, "folder": tmp_path, "limit": math.inf})
    writer.close()
    (record,) = read_metrics(tmp_path / METRICS_FILE)
    assert record.pop("time").endswith("+00:00")
    assert record == {
        "event": "start",
        "step": 7,
        "layout": {"tensor": 2},
        "folder": str(tmp_path),
        "limit": "inf",
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_strict_json(tmp_path: Path, value: float) -> None:
    writer = open_writer(tmp_path)
    writer.write_step(replace(STEP, loss=value, grad_norm=value))
    writer.close()
    text = (tmp_path / METRICS_FILE).read_text()
    record = json.loads(text, parse_constant=refuse_constant)
    assert record["loss"] == record["grad_norm"] == str(value)
    assert str(float(record["loss"])) == str(value)
    assert str(float.fromhex(record["loss_hex"])) == str(value)


def test_a_line_is_in_the_file_before_the_next_step(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    for step in (1, 2):
        writer.write_step(replace(STEP, step=step))
        assert events(tmp_path)[-1] == ("step", step)
    writer.close()


def test_tensorboard_waits_for_the_disk_when_it_is_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    flushed: list[bool] = []
    monkeypatch.setattr(tensorboard.SummaryWriter, "flush", lambda _: flushed.append(True))
    writer = MetricsWriter(tmp_path, tensorboard=True, enabled=True, resume_step=0)
    for step in (1, 2, 3):
        writer.write_step(replace(STEP, step=step))
    writer.write_eval(EVAL)
    assert flushed == []
    writer.flush()
    assert flushed == [True]
    writer.close()


def test_a_disabled_writer_writes_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=True, enabled=False, resume_step=0)
    writer.write_start({})
    writer.write_step(STEP)
    writer.write_eval(EVAL)
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 5)
    write_steps(tmp_path, 4, 6)
    steps = [step for event, step in events(tmp_path) if event == "step"]
    evaluations = [step for event, step in events(tmp_path) if event == "eval"]
    starts = [step for event, step in events(tmp_path) if event == "start"]
    assert (steps, evaluations, starts) == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [0, 3])


def test_the_lines_before_the_resumed_step_stay_byte_for_byte(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    before = (tmp_path / METRICS_FILE).read_bytes()
    write_steps(tmp_path, 4, 4)
    assert (tmp_path / METRICS_FILE).read_bytes().startswith(before)


@pytest.mark.parametrize("torn", [b'{"event": "step", "st', b'{"event": "step", "step": 2}', b"\0"])
def test_a_line_that_a_kill_left_unfinished_is_dropped(tmp_path: Path, torn: bytes) -> None:
    write_steps(tmp_path, 1, 2)
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(torn)
    write_steps(tmp_path, 3, 3)
    assert events(tmp_path)[-3:] == [("start", 2), ("step", 3), ("eval", 3)]
    assert len(events(tmp_path)) == 8


def test_a_kill_while_lines_are_moved_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_steps(tmp_path, 1, 5)
    before = (tmp_path / METRICS_FILE).read_bytes()

    def kill(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", kill)
    with pytest.raises(KeyboardInterrupt):
        open_writer(tmp_path, resume_step=3).write_start({})
    assert (tmp_path / METRICS_FILE).read_bytes() == before


def test_a_file_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"missing/metrics\.jsonl: cannot be written: No such file"):
        open_writer(tmp_path / "missing")


def test_a_write_that_fails_is_a_disk_error(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"metrics\.jsonl: cannot be written: File too large"):
            writer.write_step(STEP)
        # Closing tries to write what is left, and must not hide the first error by another kind.
        with pytest.raises(DiskError):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "line", ["not JSON", "[1]", '{"event": "step"}', '{"event": "other", "step": 1}', '{"step": 1}']
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    write_steps(tmp_path, 1, 1)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 4: must be a JSON object"):
        read_metrics(tmp_path / METRICS_FILE)


def test_missing_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: cannot be read: No such file"):
        read_metrics(tmp_path / METRICS_FILE)


def test_tensorboard_gets_the_values_at_their_steps(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = MetricsWriter(tmp_path, tensorboard=True, enabled=True, resume_step=0)
    for step in (1, 2):
        writer.write_step(replace(STEP, step=step, loss=float(step), mfu=None))
    writer.write_eval(replace(EVAL, step=2))
    writer.close()
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(1, 1.0), (2, 2.0)]
    assert [(e.step, e.value) for e in board.Scalars("valid/loss")] == [(2, 2.0)]
    assert "speed/mfu" not in board.Tags()["scalars"]


def test_missing_tensorboard_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install -c constraints.txt -e \.\[tensorboard\]"):
        MetricsWriter(tmp_path, tensorboard=True, enabled=True, resume_step=0)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_hides_the_steps_that_come_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume_step, loss in ((0, 1.0), (2, 2.0)):
        writer = MetricsWriter(tmp_path, tensorboard=True, enabled=True, resume_step=resume_step)
        for step in range(resume_step + 1, 5):
            writer.write_step(replace(STEP, step=step, loss=loss))
        writer.close()
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_a_window_averages_steps_and_weighs_rates_by_time() -> None:
    window = Window()
    window.add(replace(STEP, loss=4.0, step_seconds=3.0, tokens_per_second=100.0, mfu=0.1))
    window.add(replace(STEP, step=2, loss=2.0, step_seconds=1.0, tokens_per_second=300.0, mfu=0.3))
    mean = window.summarize()
    assert (mean.step, mean.loss, mean.step_seconds) == (2, 3.0, 2.0)
    # 600 tokens in 4 seconds.
    assert mean.tokens_per_second == 150.0
    assert mean.mfu == pytest.approx(0.15, rel=1e-15)


def test_a_window_leaves_skipped_steps_out_of_the_loss() -> None:
    window = Window()
    window.add(replace(STEP, loss=3.0, grad_norm=0.25))
    window.add(replace(STEP, loss=math.inf, grad_norm=math.nan, skipped=True))
    mean = window.summarize()
    assert (mean.loss, mean.grad_norm, mean.skipped) == (3.0, 0.25, True)


def test_a_window_of_skipped_steps_shows_their_loss() -> None:
    window = Window()
    window.add(replace(STEP, loss=math.inf, skipped=True))
    assert window.summarize().loss == math.inf


def test_a_window_starts_anew_after_its_summary() -> None:
    window = Window()
    window.add(replace(STEP, loss=9.0, peak_memory_bytes=2**40))
    window.summarize()
    window.add(STEP)
    assert window.summarize() == STEP


def test_the_log_line_tells_everything_once() -> None:
    metrics = replace(STEP, step=1200, consumed_samples=307_200, consumed_tokens=629_145_600)
    assert log_line(metrics, total_steps=4768, total_samples=1_220_608) == (
        "step 1200/4768 | loss 3.2500 | lr 3.00e-04 | norm 0.500 | batch 256 | 629M tokens | "
        "2 s/step 262k tok/s | MFU 48.5% | ETA 1:58:56"
    )


def test_the_log_line_has_no_mfu_on_an_unknown_device() -> None:
    line = log_line(replace(STEP, mfu=None), total_steps=10, total_samples=2560)
    assert "MFU n/a" in line


def test_the_log_line_tells_of_skipped_updates() -> None:
    line = log_line(replace(STEP, skipped=True), total_steps=10, total_samples=2560)
    assert "norm 0.500 (skipped updates)" in line


def test_the_log_line_tells_the_loss_scale_and_how_many_steps_were_skipped() -> None:
    metrics = replace(STEP, loss_scale=65536.0, skipped_steps=12)
    line = log_line(metrics, total_steps=10, total_samples=2560)
    assert "norm 0.500 | scale 65536 skipped 12 | batch" in line


def test_log_lines_of_early_and_late_steps_align() -> None:
    early = log_line(replace(STEP, step=1), total_steps=1000, total_samples=256_000)
    late = log_line(
        replace(STEP, step=1000, consumed_samples=256_000), total_steps=1000, total_samples=256_000
    )
    assert early.index("|") == late.index("|")


def test_the_line_of_an_evaluation() -> None:
    assert eval_line(EVAL) == "step 1 | valid loss 2.0000 perplexity 7.39 bits/byte 0.7500"
    assert eval_line(replace(EVAL, bits_per_byte=None)).endswith("perplexity 7.39")


def test_the_perplexity_of_a_huge_loss_is_infinite() -> None:
    assert replace(EVAL, loss=1000.0).perplexity == math.inf


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.4, "0:00:59"), (59.6, "0:01:00"), (3661, "1:01:01"), (1e6, "277:46:40")],
)
def test_durations_are_hours_minutes_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1.5, "1.5"),
        (999, "999"),
        (999.6, "1k"),
        (43_210, "43.2k"),
        (999_950, "1M"),
        (629_145_600, "629M"),
        (366e9, "366B"),
        (1.5e12, "1.5T"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_numbers_keep_three_digits(value: float, text: str) -> None:
    assert short_number(value) == text


def test_the_dataset_that_is_read_most_often_is_told_first() -> None:
    summaries = [DatasetSummary(f"d{n}", 0.1, 1_000_000, 5, float(n)) for n in range(10)]
    lines = list(data_lines(summaries))
    assert lines[0] == "data: 10M tokens to train on; 50 to validate with"
    assert lines[1] == "data: 10.0% from d9, 9 epochs of 1M tokens"
    assert lines[9:] == ["data: 20.0% from 2 more, at most 1 epochs each"]
    assert not list(data_lines([]))
