"""The planner's table, plot and errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron.errors import ConfigError
from tools.plan import main

ROOT = Path(__file__).parents[2]

CONFIG = {
    "folder": "run",
    "model": {
        "num_layers": 8,
        "hidden_size": 1024,
        "num_heads": 16,
        "vocab_size": 50_000,
        "seq_length": 2048,
    },
    "train": {"samples": 640, "global_batch_size": 64, "micro_batch_size": 4, "dtype": "bf16"},
    "parallel": {"tensor": 2},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_best_layouts_and_the_configs_own_are_printed(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config), "--gpus", "8", "--best", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "layouts fit in 80 GiB" in lines[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    heading, _, *best = rows[:5]
    assert heading[1:5] == ["tensor", "pipeline", "data", "micro-batch"]
    assert [row[0] for row in best] == ["1", "2", "3"]
    assert all(int(row[1]) * int(row[2]) * int(row[3]) == 8 for row in best)
    times = [float(row[heading.index("s a step")]) for row in best]
    assert times == sorted(times)
    (own,) = rows[7:]
    assert own[1:8] == ["2", "1", "4", "4", "0", "no", "none"]


def test_options_of_the_config_can_be_given(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--config", str(config), "--gpus", "2", "--train.global_batch_size", "1"])
    assert "| 1 " in capsys.readouterr().out


def test_less_memory_is_planned_for(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config", str(config), "--cluster", "h200", "--gpus", "8", "--memory", "16"])
    assert "layouts fit in 16 GiB" in capsys.readouterr().out


def test_plot_is_a_png(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plots" / "plan.png"
    main(["--config", str(config), "--gpus", "8", "--plot", str(plot)])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"wrote {plot}\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "8", "--memory", "0"], "--memory must be greater than 0 and finite, got 0"),
        (["--gpus", "0"], "--gpus must be greater than 0 and finite, got 0"),
        (["--gpus", "12"], r"--gpus \(12\) must be a multiple of --gpus_per_node \(8\)"),
        (["--gpus", "8", "--best", "0"], "--best must be greater than 0 and finite, got 0"),
        (["--gpus", "8", "--optimiser.lr", "1"], "optimiser.lr is not an option"),
        (["--gpus", "8", "--memory", "4.2"], "fits in 4.2 GiB each; the least needs"),
    ],
)
def test_wrong_options_are_told(config: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--config", str(config), *options])


def test_error_is_one_message_and_exit_code_2(config: Path) -> None:
    command = [sys.executable, "-m", "tools.plan", "--config", str(config), "--gpus", "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --gpus (12) must be a multiple")
    assert len(done.stderr.splitlines()) == 1
