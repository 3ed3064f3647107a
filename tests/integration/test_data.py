"""What a run makes of data that is not what it was, or lies where nothing can be written."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron.data.text_bytes import write_text_bytes
from tests.figures import Figure
from tests.integration.runs import (
    Result,
    base_argv,
    make_data,
    make_tokenizer,
    records,
    run_pretrain,
    values,
)
from tests.megatron.data.test_loader import describe

DATA, CHECKPOINT = 3, 4


def train(folder: Path, run: str, world_size: int = 1, **changes: Any) -> Result:
    argv = base_argv(
        folder,
        folder=folder / run,
        model__num_layers=1,
        model__hidden_size=16,
        **{
            "data__split": [1, 0, 0],
            "data__paths": {str(folder / "text"): 0.6, str(folder / "more"): 0.4},
            "train__samples": 24,
            **changes,
        },
    )
    return run_pretrain(argv, world_size=world_size)


def make_corpus(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    make_data(folder / "text")
    make_data(folder / "more", seed=1)
    make_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets, a run that was left alone, and one that was stopped after three steps."""
    folder = make_corpus(tmp_path_factory.mktemp("trained"))
    tokenizer = {"data__tokenizer": folder / "tokenizer.json"}
    assert train(folder, "alone", **tokenizer).exit_code == 0
    assert train(folder, "run", train__stop_at_step=3, **tokenizer).exit_code == 0
    return folder


def flip(folder: Path) -> None:
    with (folder / "more.bin").open("r+b") as file:
        file.seek(100)
        (byte,) = file.read(1)
        file.seek(100)
        file.write(bytes([byte ^ 1]))


def shuffle(folder: Path) -> None:
    path = folder / "text.bin"
    np.random.default_rng(0).permutation(np.fromfile(path, np.uint16)).tofile(path)


def other_corpus(folder: Path) -> None:
    make_data(folder / "text", seed=7)


def nothing(folder: Path) -> None:
    pass


OTHER: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "flipped bit": (flip, {}, "more is"),
    "shuffled tokens": (shuffle, {}, "text is"),
    "corpus": (other_corpus, {}, "text is"),
    "seed": (nothing, {"train__seed": 5}, "train.seed is 5, but was 1234"),
    "split": (nothing, {"data__split": [9, 1, 0]}, "data.split is [0.9, 0.1, 0.0]"),
}


def at(folder: Path) -> dict[str, Any]:
    return {"data__tokenizer": folder / "tokenizer.json"}


@pytest.mark.parametrize("name", OTHER)
def test_run_does_not_go_on_with_other_data(trained: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    change, options, words = OTHER[name]
    change(folder)
    result = train(folder, "run", **at(folder), **options)
    assert result.exit_code == CHECKPOINT
    (message,) = result.complaints
    assert words in message
    assert "checkpoint.accept_new_data" in message


def test_run_goes_on_with_other_data_that_is_accepted(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    flip(folder)
    result = train(folder, "run", 2, **at(folder), checkpoint__accept_new_data=True)
    assert result.exit_code == 0
    (line,) = result.complaints
    assert "goes on with other data, as checkpoint.accept_new_data says" in line
    assert len(values(folder / "run", "loss")) == 6
    # The data is now that of the newest save.
    assert train(folder, "run", **at(folder)).exit_code == 0


def test_moved_data_is_the_same(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "elsewhere"))
    result = train(folder, "run", **at(folder))
    assert (result.exit_code, result.complaints) == (0, [])
    assert values(folder / "run", "loss_hex") == values(trained / "alone", "loss_hex")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """Data on a file system that is mounted read-only."""
    folder = tmp_path / "mount"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"this user cannot mount: {done.stderr.decode().strip()}")
    make_corpus(folder)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_data_on_a_read_only_mount_trains(read_only: Path, tmp_path: Path, trained: Path) -> None:
    paths = {str(read_only / "text"): 0.6, str(read_only / "more"): 0.4}
    result = train(tmp_path, "run", 2, data__paths=paths)
    assert result.exit_code == 0
    (line,) = result.complaints
    assert "nothing is kept for the next start: " in line
    assert line.endswith("Read-only file system")
    assert values(tmp_path / "run", "loss") == pytest.approx(values(trained / "alone", "loss"))


def test_cache_folder_that_is_a_file_is_told_once(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    (folder / "cache").touch()
    result = train(folder, "new", 2, data__cache_folder=folder / "cache")
    assert result.exit_code == 0
    (line,) = result.complaints
    assert line.endswith(f"{folder / 'cache'}: cannot be made: File exists")
    alone = values(trained / "alone", "loss")
    assert values(folder / "new", "loss") == pytest.approx(alone)


def test_token_outside_the_vocabulary_ends_a_described_run_before_it_begins(
    trained: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    tokens = np.fromfile(folder / "more.bin", np.uint16)
    tokens[500] = 700
    tokens.tofile(folder / "more.bin")
    describe(folder / "more", largest_token=508)
    result = train(folder, "new", 2)
    assert result.exit_code == DATA
    (message,) = result.complaints
    assert "more.bin: has the token id 700 at byte 1000 (document " in message


def test_bits_per_byte_are_those_of_the_evaluated_text(tmp_path: Path, figure: Figure) -> None:
    """Documents for training have 1 byte a token, those for validation 3."""
    prefix = tmp_path / "text"
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(40):
            writer.add(random.integers(1, 500, 60))
            writer.end_document()
    describe(prefix, text_bytes=write_text_bytes(prefix, [60] * 36 + [180] * 4))
    assert len(IndexedDataset(prefix)) == 40
    result = train(
        tmp_path,
        "run",
        data__paths={str(prefix): 1.0},
        data__split=[9, 1, 0],
        train__samples=8,
        train__eval_interval=1,
        train__eval_samples=4,
    )
    assert result.exit_code == 0
    for record in records(tmp_path / "run", "eval"):
        assert record["bits_per_byte"] == pytest.approx(record["loss"] / np.log(2) / 3)
    figure("bits per byte", bytes_per_token=record["loss"] / np.log(2) / record["bits_per_byte"])
    os.remove(f"{prefix}.bytes")
    assert train(tmp_path, "again", data__paths={str(prefix): 1.0}).exit_code == 0
