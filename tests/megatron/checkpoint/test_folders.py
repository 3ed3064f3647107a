"""Which folders are saves."""

import errno
import logging
import os
from pathlib import Path

import pytest

from megatron.checkpoint.folders import (
    find_latest,
    list_checkpoints,
    remove_old,
    step_folders,
)
from megatron.errors import CheckpointError
from tests.megatron.checkpoint.sample import edit_manifest, save


def test_saves_are_listed_oldest_first(tmp_path: Path) -> None:
    paths = {step: save(tmp_path, step) for step in (200, 1000000000, 100)}
    assert list_checkpoints(tmp_path) == [(step, paths[step]) for step in (100, 200, 1000000000)]
    assert find_latest(tmp_path) == paths[1000000000]


def test_no_folder_holds_no_saves(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "nothing") == []
    assert find_latest(tmp_path / "nothing") is None
    assert find_latest(tmp_path) is None


def test_folder_of_another_name_is_no_save(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    for name in (".step-00000300.tmp-12", "step-300", "step-00000300.damaged-1", "xstep-00000300"):
        path.rename(tmp_path / name)
        assert list_checkpoints(tmp_path) == []
        (tmp_path / name).rename(path)


def test_damaged_saves_are_logged_and_not_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, 100)
    (save(tmp_path, 200) / "manifest.json").write_bytes(b"{}")
    edit_manifest(save(tmp_path, 300), lambda fields: fields.update(format=2))
    (tmp_path / "step-00000400").mkdir()
    os.truncate(save(tmp_path, 500) / "rank-00000.safetensors", 100)
    (tmp_path / "step-00000600").write_bytes(b"a file")
    with caplog.at_level(logging.WARNING):
        assert list_checkpoints(tmp_path) == [(100, path)]
    messages = [record.getMessage() for record in caplog.records]
    assert "step-00000200/manifest.json: is not the manifest" in messages[0]
    assert "step-00000300/manifest.json: has format 2" in messages[1]
    assert "step-00000400/manifest.json: the file is missing" in messages[2]
    assert "step-00000500/rank-00000.safetensors: is damaged: 100 bytes" in messages[3]
    assert "step-00000600" in messages[4]


def test_damaged_save_is_the_newest_all_the_same(tmp_path: Path) -> None:
    save(tmp_path, 100)
    (tmp_path / "step-00000200").mkdir()
    assert find_latest(tmp_path) == tmp_path / "step-00000200"


def test_folder_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> list[str]:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.listdir", fail)
    for find in (find_latest, list_checkpoints, step_folders):
        with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
            find(tmp_path)


def test_damaged_saves_neither_count_nor_are_removed(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        save(tmp_path, step)
    os.truncate(tmp_path / "step-00000300/rank-00000.safetensors", 100)
    (tmp_path / "step-00000400/manifest.json").unlink()
    remove_old(tmp_path, save(tmp_path, 500), keep_last=2)
    left = ["step-00000200", "step-00000300", "step-00000400", "step-00000500"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
