"""The README's first command, with few steps."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quickstart_runs_to_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    environment = {
        **os.environ,
        "INSTALLED": "1",
        "SAMPLES": "64",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    command = ["bash", "examples/quickstart.sh", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "saved at layout {'tensor': 2" in done.stdout, "it goes on at another tensor size"
    assert "BloomForCausalLM continues:" in done.stdout
    for name in ("below chance by", "bits per byte"):
        assert name in done.stdout
    for file in ("run/report.png", "run/report.html", "hf/model.safetensors"):
        assert (folder / file).stat().st_size > 0


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    command = ["bash", "examples/quickstart.sh", str(tmp_path)]
    environment = {**os.environ, "INSTALLED": "1", "PATH": f"{Path(sys.executable).parent}:/bin"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert f"{tmp_path} is there already" in done.stderr
