"""What a start does to the folder of a run: nothing before its last check, and nothing is lost."""

import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.training.metrics import METRICS_FILE, read_metrics
from tests.integration.runs import (
    Result,
    base_argv,
    contents,
    make_data,
    newest_save,
    records,
    run_pretrain,
    values,
)

STEPS = 4
CONFIG, CHECKPOINT, DISK = 2, 4, 5


def start(run: Path, world_size: int = 1, **changes: Any) -> Result:
    arguments = {
        "folder": run,
        "train__samples": 4 * STEPS,
        "checkpoint__save_interval": 1,
        "checkpoint__keep_last": 3,
        "model__hidden_dropout": 0.1,
        **changes,
    }
    return run_pretrain(base_argv(run.parent, **arguments), world_size=world_size)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a complete run, which has its saves of steps 2, 3 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    make_data(folder / "text")
    assert start(folder / "run").exit_code == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run and its data, for a test of its own."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def assert_same(run: Path, undisturbed: Path) -> None:
    """Both have made the same steps, and end with the same save."""
    for name in ("loss_hex", "grad_norm_hex"):
        assert values(run, name) == values(undisturbed, name)
    name = f"checkpoints/step-0000000{STEPS}/rank-00000.safetensors"
    assert (run / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.parametrize("world_size", [1, 2])
def test_complete_run_says_so_in_one_line_and_stays_as_it_is(run: Path, world_size: int) -> None:
    before = contents(run)
    result = start(run, world_size)
    assert result.exit_code == 0
    assert result.complaints == []
    line = "complete: step 4 of 4, 16 of 16 samples; raise train.samples to go on\n"
    assert result.stdout.count(line) == 1
    assert contents(run) == before


@pytest.mark.parametrize("stop", [2, 4])
def test_stopped_run_says_so_in_one_line_and_stays_as_it_is(run: Path, stop: int) -> None:
    before = contents(run)
    result = start(run, train__samples=40, train__stop_at_step=stop)
    assert result.exit_code == 0
    line = f"stopped at train.stop_at_step {stop}: step 4 of 10, 16 of 40 samples; raise it to go"
    assert result.stdout.count(line) == 1
    assert contents(run) == before


@pytest.mark.parametrize(
    "change",
    [
        {"train__global_batch_size": 5},
        {"data__paths": {"missing": 1.0}},
        {"data__tokenizer": "missing.json"},
        {"checkpoint__resume": "required"},
        {"model__layernorm": "apex"},
        {"launch__device": "cuda"},
        {"model__seq_length": 100_000},
    ],
    ids=str,
)
def test_refused_start_makes_no_folder(run: Path, change: dict[str, Any]) -> None:
    new = {"folder": run.parent / "new/and/deep"}
    assert start(run, **new, **change).exit_code in (2, 3, 4)
    assert not (run.parent / "new").exists()


def test_each_accepted_start_keeps_its_config(run: Path) -> None:
    assert start(run, train__samples=20, optimizer__lr=0.25).exit_code == 0
    assert start(run, train__samples=24, model__num_layers=3).exit_code == CHECKPOINT
    rates = [yaml.safe_load(path.read_text())["optimizer"]["lr"] for path in configs(run)]
    assert rates == [0.005, 0.25, 0.25]
    assert configs(run)[1].read_bytes() == configs(run)[2].read_bytes()


def configs(run: Path) -> list[Path]:
    return [run / name for name in ("config-0001.yaml", "config-0002.yaml", "config.yaml")]


def damage(run: Path, step: int, name: str) -> None:
    path = run / f"checkpoints/step-0000000{step}" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("world_size", "name"), [(1, "rank-00000.safetensors"), (2, "manifest.json")]
)
def test_damaged_saves_are_passed_over_on_demand_and_saved_again(
    run: Path, trained: Path, world_size: int, name: str
) -> None:
    for step in (3, 4):
        damage(run, step, name)
    before = contents(run)
    refused = start(run, world_size)
    assert refused.exit_code == CHECKPOINT
    assert f"step-00000004/{name}: is damaged" in refused.complaints[0]
    assert "checkpoint.skip_damaged true passes over it" in refused.stderr
    assert contents(run) == before

    result = start(run, world_size, checkpoint__skip_damaged=True)
    assert result.exit_code == 0
    for step in (3, 4):
        assert result.stderr.count(f"step-0000000{step}/{name}: is damaged") == 1
        assert len(list(run.glob(f"checkpoints/step-0000000{step}.damaged-*"))) == 1
    assert "checkpoints/step-00000002, saved at layout" in result.stdout
    if world_size == 1:
        assert_same(run, trained / "run")
    assert start(run, world_size).exit_code == 0, "whole again"


def test_fresh_start_after_damage_to_all_saves_is_asked_for_and_loses_nothing(
    run: Path, trained: Path
) -> None:
    for step in (2, 3, 4):
        damage(run, step, "manifest.json")
    old = (run / METRICS_FILE).read_bytes()
    assert start(run).exit_code == CHECKPOINT
    result = start(run, checkpoint__skip_damaged=True)
    assert result.exit_code == 0
    assert f"no whole save is left in {run}/checkpoints" in result.stderr
    assert (run / "metrics-cut-0001.jsonl").read_bytes() == old
    assert_same(run, trained / "run")


def test_newest_save_that_was_taken_away_is_told(run: Path, trained: Path) -> None:
    shutil.rmtree(run / "checkpoints/step-00000004")
    result = start(run)
    assert result.exit_code == 0
    (line,) = result.complaints
    assert "metrics.jsonl: tells of the save step-00000004, but" in line
    assert line.endswith("holds no newer one than step-00000003")
    cut = read_metrics(run / "metrics-cut-0001.jsonl")
    assert [(record["event"], record["step"]) for record in cut] == [("step", 4), ("save", 4)]
    assert_same(run, trained / "run")


def test_saves_are_in_the_metrics(run: Path) -> None:
    assert [record["step"] for record in records(run, "save")] == [1, 2, 3, 4]


def test_damaged_save_is_not_counted_among_those_that_are_kept(run: Path) -> None:
    os.truncate(run / "checkpoints/step-00000003/rank-00000.safetensors", 1000)
    assert start(run, train__samples=24).exit_code == 0
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == [f"step-0000000{step}" for step in (3, 4, 5, 6)]
    assert newest_save(run).state["step"] == 6


def test_full_disk_at_a_start_changes_nothing(run: Path) -> None:
    before = contents(run)
    arguments = base_argv(run.parent, folder=run, train__samples=24)
    result = run_pretrain(arguments, prepare=limit_file_size)
    assert result.exit_code == DISK
    assert result.complaints[-1].endswith("config.yaml: cannot be written: File too large")
    assert contents(run) == before


def test_missing_tensorboard_changes_nothing(run: Path) -> None:
    before = contents(run)
    arguments = base_argv(run.parent, folder=run, train__samples=24, log__tensorboard=True)
    result = run_pretrain(arguments, prepare=hide_tensorboard)
    assert result.exit_code == CONFIG
    assert "pip install -c constraints.txt -e .[tensorboard]" in result.complaints[-1]
    assert contents(run) == before


def hide_tensorboard() -> None:
    sys.modules["torch.utils.tensorboard"] = None  # type: ignore[assignment]


@pytest.mark.parametrize("name", ["manifest.json", "checkpoints", METRICS_FILE])
def test_disk_that_fails_is_not_taken_for_one_that_holds_nothing(run: Path, name: str) -> None:
    before = contents(run)
    arguments = base_argv(run.parent, folder=run, train__samples=24)
    result = run_pretrain(arguments, prepare=partial(fail_to_read, name))
    assert result.exit_code == (DISK if name == METRICS_FILE else CHECKPOINT)
    assert f"{name}: cannot be read: Input/output error" in result.stderr
    assert contents(run) == before


def fail_to_read(name: str) -> None:
    """Let every read of files or folders of that name fail, as on a network that is away."""
    for owner, attribute in ((Path, "read_bytes"), (Path, "open"), (os, "listdir")):
        setattr(owner, attribute, partial_failure(getattr(owner, attribute), name))


def partial_failure(read: Callable[..., Any], name: str) -> Callable[..., Any]:
    def read_or_fail(path: Any, *args: Any, **options: Any) -> Any:
        if Path(path).name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path, *args, **options)

    return read_or_fail


def limit_file_size() -> None:
    """Let the lock be written, and the config not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
