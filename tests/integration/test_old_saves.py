"""Runs that earlier versions wrote go on as those versions would have gone on."""

import shutil
from pathlib import Path

import pytest

from tests.integration.runs import options, run_pretrain, values

FIXTURES = Path(__file__).parents[1] / "fixtures"
# What the version that wrote the run went on with, in float64.
LOSSES = {"run-1": [6.203654922177773, 6.294850451918885]}
NORMS = {"run-1": [0.6542193292214424, 0.5585491426737469]}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_run_of_an_earlier_version_goes_on(tmp_path: Path, name: str, world_size: int) -> None:
    shutil.copytree(FIXTURES / name, tmp_path, dirs_exist_ok=True)
    result = run_pretrain(
        [
            *("--config", str(tmp_path / "run" / "config.yaml")),
            *options(
                folder=tmp_path / "run",
                data__paths={str(tmp_path / "text"): 0.6, str(tmp_path / "more"): 0.4},
                data__cache_folder=tmp_path / "cache",
                train__stop_at_step=4,
                parallel__tensor=world_size,
            ),
        ],
        world_size=world_size,
    )
    assert result.exit_code == 0, result.stderr
    assert "resumed from" in result.stdout
    assert values(tmp_path / "run", "loss")[2:] == pytest.approx(LOSSES[name], rel=1e-12)
    assert values(tmp_path / "run", "grad_norm")[2:] == pytest.approx(NORMS[name], rel=1e-12)
