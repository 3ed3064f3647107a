"""The command line that looks into checkpoints."""

import json
import os
from pathlib import Path

import pytest

from megatron.checkpoint.load import open_checkpoint
from megatron.errors import CheckpointError
from tests.megatron.checkpoint.sample import save
from tools.checkpoint import main


def test_inspect_shows_tensors_config_and_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(save(tmp_path))]) == 0
    out = capsys.readouterr().out
    rows = {tuple(line.split()) for line in out.splitlines()}
    assert ("weight", "gated", "float32", "16", "x", "3", "2", "192") in rows
    assert ("exp_avg", "scale", "bfloat16", "scalar", "1", "2") in rows
    assert '"consumed_samples": 800' in out
    assert '"num_layers": 2' in out
    assert "tokenizer/tokenizer.json" in out


def test_verify_accepts_what_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(save(tmp_path))]) == 0
    assert "every file is as it was written" in capsys.readouterr().out


def test_how_much_has_been_verified_is_told_after_each_file(tmp_path: Path) -> None:
    path = save(tmp_path)
    told: list[int] = []
    reader = open_checkpoint(path, told=told.append)
    manifest = json.loads((path / "manifest.json").read_text())
    sizes = sorted((file["bytes"] for file in manifest["files"].values()), reverse=True)
    assert len(sizes) > 1
    assert told == [sum(sizes[:count]) for count in range(1, len(sizes) + 1)]
    assert reader.path == path


def test_verify_of_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    os.truncate(path / "rank-00000.safetensors", 100)
    with pytest.raises(CheckpointError, match="rank-00000.safetensors: is damaged: 100 bytes long"):
        main(["verify", str(path)])


def test_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing: is neither a checkpoint nor a run folder"):
        main(["inspect", str(tmp_path / "nothing")])


def test_a_run_is_named_by_its_folder_and_its_newest_save_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saves = tmp_path / "run" / "checkpoints"
    saves.mkdir(parents=True)
    save(tmp_path / "a").rename(saves / "step-00000100")
    newest = save(tmp_path / "b").rename(saves / "step-00000200")
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{newest}: every file is as it was written\n"
