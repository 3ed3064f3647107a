"""Which folders are saves."""

import logging
from pathlib import Path

import pytest

from megatron.checkpoint.folders import find_latest, list_checkpoints
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


def test_folder_without_a_valid_manifest_is_passed_over_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, 100)
    (save(tmp_path, 200) / "manifest.json").write_bytes(b"{}")
    edit_manifest(save(tmp_path, 300), lambda fields: fields.update(format=2))
    (tmp_path / "step-00000400").mkdir()
    with caplog.at_level(logging.WARNING):
        assert find_latest(tmp_path) == path
    messages = [record.getMessage() for record in caplog.records]
    assert "step-00000400/manifest.json: the file is missing" in messages[0]
    assert "step-00000300/manifest.json: has format 2" in messages[1]
    assert "step-00000200/manifest.json: is not the manifest" in messages[2]
    assert list_checkpoints(tmp_path) == [(100, path)]
