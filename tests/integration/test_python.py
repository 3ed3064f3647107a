"""Training from a Python program: what it is told, and what it gets back."""

import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from megatron.config import load_config
from megatron.training.callbacks import Callback, TrainResult
from megatron.training.metrics import EvalMetrics, StepMetrics
from megatron.training.trainer import Trainer
from tests.integration.runs import base_argv, make_data, values


class Notes(Callback):
    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.losses: list[float] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.told.append(("step", metrics.step))
        self.losses.append(metrics.loss)

    def on_evaluation(self, metrics: EvalMetrics) -> None:
        self.told.append(("evaluation", metrics.step))

    def on_save(self, step: int, path: Path) -> None:
        assert (path / "manifest.json").exists()
        self.told.append(("save", step))


class Stops(Callback):
    def on_step(self, metrics: StepMetrics) -> None:
        raise ValueError("enough")


def train(folder: Path, *callbacks: Callback, **changes: object) -> TrainResult:
    options = {
        "train__samples": 32,
        "train__global_batch_size": 8,
        "checkpoint__save_interval": 2,
        **changes,
    }
    return Trainer(load_config(base_argv(folder, **options)), callbacks).train()


def in_process(body: Callable[[Path], None], folder: Path) -> None:
    """Run ``body`` in a process that has no process group yet."""
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        pool.submit(body, folder).result()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_data(tmp_path / "text")
    return tmp_path


def test_a_program_is_told_of_steps_evaluations_and_saves_and_gets_the_end(folder: Path) -> None:
    in_process(check_told, folder)


def check_told(folder: Path) -> None:
    notes = Notes()
    split = {"data__split": [8, 2, 0], "train__eval_interval": 3, "train__eval_samples": 8}
    result = train(folder, notes, **split)
    assert notes.told == [
        *(("step", 1), ("step", 2), ("save", 2), ("step", 3), ("evaluation", 3)),
        *(("step", 4), ("evaluation", 4), ("save", 4)),
    ]
    assert notes.losses == values(folder / "run", "loss")
    assert (result.progress.step, result.progress.consumed_samples) == (4, 32)
    assert result.complete
    assert result.save == folder / "run/checkpoints/step-00000004"
    assert result.last_step is not None
    assert result.last_step.loss == notes.losses[-1]
    assert result.last_evaluation is not None
    assert result.last_evaluation.step == 4
    again = train(folder, notes, **split)
    assert (again.progress, again.complete, again.save) == (result.progress, True, result.save)
    assert again.last_step is None


def test_what_a_callback_raises_ends_the_run_and_the_folder_goes_on(folder: Path) -> None:
    in_process(check_raised, folder)


def check_raised(folder: Path) -> None:
    with pytest.raises(ValueError, match="enough"):
        train(folder, Stops())
    assert train(folder).progress.step == 4


def test_a_run_trains_in_a_thread(folder: Path) -> None:
    in_process(check_thread, folder)


def check_thread(folder: Path) -> None:
    results: list[TrainResult] = []
    thread = threading.Thread(target=lambda: results.append(train(folder)))
    thread.start()
    thread.join()
    assert [result.progress.step for result in results] == [4]
