"""What is told of steps and evaluations, by rank 0 alone."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from torch.distributed import ProcessGroup

from megatron.config import config_to_dict
from megatron.engine.base import StepResult
from megatron.launch import Launch
from megatron.model.flops import count_parameters, flops_per_token
from megatron.training.metrics import METRICS_FILE, Record, read_metrics
from megatron.training.progress import Progress
from megatron.training.reporter import Reporter
from mpu import ParallelDims, ParallelGroups
from tests.megatron.training.sample import CPU, SEQ_LENGTH, make_config


@pytest.fixture
def launch(single_group: ProcessGroup) -> Launch:
    groups = [single_group] * 5
    return Launch(0, 1, CPU, ParallelGroups(ParallelDims(), *groups))


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def report(
    folder: Path,
    launch: Launch,
    start: Progress | None = None,
    bytes_per_token: float | None = None,
) -> list[Record]:
    """What is written of all steps of 0.5 seconds after ``start``, and one evaluation."""
    config = make_config(folder, data={"paths": {str(folder / "text"): 1.0}})
    config.folder.mkdir(exist_ok=True)
    before = read_all(config.folder)
    progress = start or Progress()
    reporter = Reporter(config, launch, progress, bytes_per_token=bytes_per_token)
    assert read_all(config.folder) == before, "making a reporter changes nothing"
    reporter.start()
    while progress.step < 8:
        progress = progress.after(4, config.model.seq_length)
        reporter.step(progress, StepResult(3.5, 1.25), 1e-3, 4, 0.5)
    reporter.evaluation(progress, "valid", 2.0)
    reporter.close()
    path = config.folder / METRICS_FILE
    return read_metrics(path) if path.exists() else []


def test_start_tells_layout_and_size(tmp_path: Path, launch: Launch) -> None:
    first = report(tmp_path, launch)[0]
    config = make_config(tmp_path)
    assert first["event"] == "start"
    sizes = {"tensor": 1, "data": 1, "pipeline": 1}
    assert first["layout"] == {**sizes, "sequence": False, "zero": 0}
    assert first["parameters"] == count_parameters(config.model)
    assert first["config"]["model"]["hidden_size"] == 16


def test_speed_follows_from_the_time_of_the_step(tmp_path: Path, launch: Launch) -> None:
    step = report(tmp_path, launch)[2]
    rate = 4 * SEQ_LENGTH / 0.5
    assert (step["step"], step["consumed_samples"], step["consumed_tokens"]) == (2, 8, 64)
    assert (step["loss"], step["grad_norm"], step["learning_rate"]) == (3.5, 1.25, 1e-3)
    assert step["tokens_per_second"] == rate
    flops = flops_per_token(make_config(tmp_path).model, "causal")
    assert step["tflops_per_device"] == rate * flops / 1e12
    assert step["mfu"] is None, "the peak of a CPU is not known"
    assert step["peak_memory_bytes"] > 10_000_000


def test_speed_of_a_device_is_a_share_of_the_whole(tmp_path: Path, launch: Launch) -> None:
    alone = report(tmp_path, launch)[-2]
    shared = report(tmp_path, replace(launch, world_size=2))[-2]
    assert shared["tokens_per_second"] == alone["tokens_per_second"]
    assert shared["tflops_per_device"] == alone["tflops_per_device"] / 2


def test_log_lines_come_at_the_interval_and_at_the_end(
    tmp_path: Path,
    launch: Launch,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron"), "propagate", True)
    caplog.set_level(logging.INFO, logger="megatron")
    report(tmp_path, launch)
    steps = [message.split()[1] for message in caplog.messages if message.startswith("step ")]
    assert steps == ["3/8", "6/8", "8/8", "8"], "three of training, one of the evaluation"


def test_bits_per_byte_need_the_length_of_the_text(tmp_path: Path, launch: Launch) -> None:
    assert report(tmp_path, launch)[-1]["bits_per_byte"] is None
    last = report(tmp_path, launch, bytes_per_token=4.0)[-1]
    assert last["bits_per_byte"] == 2.0 / math.log(2) / 4


def test_the_loss_scale_is_told(tmp_path: Path, launch: Launch) -> None:
    config = make_config(tmp_path, data={"paths": {str(tmp_path / "text"): 1.0}})
    config.folder.mkdir()
    reporter = Reporter(config, launch, Progress())
    reporter.step(Progress(1, 4), StepResult(3.5, 1.25, True, 1024.0, 3), 1e-3, 4, 0.5)
    reporter.close()
    told = read_metrics(config.folder / METRICS_FILE)[-1]
    assert (told["skipped"], told["loss_scale"], told["skipped_steps"]) == (True, 1024.0, 3)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_an_evaluation_that_is_no_number_is_a_warning(
    tmp_path: Path,
    launch: Launch,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    loss: float,
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron"), "propagate", True)
    config = make_config(tmp_path, data={"paths": {str(tmp_path / "text"): 1.0}})
    config.folder.mkdir()
    reporter = Reporter(config, launch, Progress())
    reporter.evaluation(Progress(2, 8), "valid", loss)
    reporter.close()
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage() == f"step 2: the valid loss is {loss}, not a finite number"


def test_steps_after_the_save_are_written_anew(tmp_path: Path, launch: Launch) -> None:
    report(tmp_path, launch)
    again = report(tmp_path, launch, Progress(6, 24))
    assert [r["step"] for r in again if r["event"] == "step"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [r["step"] for r in again if r["event"] == "start"] == [0, 6]


def test_each_start_leaves_its_config_under_a_number_and_as_the_newest(
    tmp_path: Path, launch: Launch
) -> None:
    run = make_config(tmp_path).folder
    texts = []
    for samples in (32, 64):
        config = make_config(tmp_path, train={"samples": samples})
        run.mkdir(exist_ok=True)
        reporter = Reporter(config, launch, Progress())
        reporter.start()
        reporter.close()
        assert yaml.safe_load((run / "config.yaml").read_text()) == config_to_dict(config)
        texts.append((run / "config.yaml").read_bytes())
    assert [(run / f"config-000{number}.yaml").read_bytes() for number in (1, 2)] == texts


def test_other_ranks_write_nothing(tmp_path: Path, launch: Launch) -> None:
    assert report(tmp_path, replace(launch, rank=1)) == []
