"""A launcher that starts a failed run again has it complete at the first restart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pretrain_bloom
from tests.figures import Figure
from tests.integration.runs import (
    base_argv,
    free_port,
    make_data,
    newest_save,
    records,
    run_pretrain,
)

STEPS = 12
# Python runs it at the start of every process of which PYTHONPATH names the folder.
FAULT = """
import os

if os.environ.get("RANK") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    import signal

    from megatron.training.reporter import Reporter

    tell = Reporter.step

    def tell_and_fail(self, progress, *args):
        tell(self, progress, *args)
        if progress.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    Reporter.step = tell_and_fail
"""


@pytest.mark.parametrize(
    "standalone", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["port", "standalone"]
)
def test_killed_rank_costs_one_restart(standalone: bool, tmp_path: Path, figure: Figure) -> None:
    make_data(tmp_path / "text")
    changes = {"parallel__tensor": 2, "checkpoint__save_interval": 4, "train__samples": 4 * STEPS}
    undisturbed = base_argv(tmp_path, folder=tmp_path / "undisturbed", **changes)
    assert run_pretrain(undisturbed, world_size=2).exit_code == 0
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    place = ["--standalone"] if standalone else [f"--master_port={free_port()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *place, "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "--max-restarts=1", pretrain_bloom.__file__, *base_argv(tmp_path, **changes)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "(exitcode: -9)" in done.stderr, "the first attempt failed"
    run = tmp_path / "run"
    assert len(records(run, "start")) == 2
    losses = {step["step"]: step["loss_hex"] for step in records(run, "step")}
    undisturbed_losses = {
        step["step"]: step["loss_hex"] for step in records(tmp_path / "undisturbed", "step")
    }
    assert losses == undisturbed_losses
    mine, theirs = newest_save(run), newest_save(tmp_path / "undisturbed")
    assert mine.state["step"] == theirs.state["step"] == STEPS
    for path in sorted(theirs.path.glob("*.safetensors")):
        assert (mine.path / path.name).read_bytes() == path.read_bytes()
    figure("killed under torchrun", restarts=1, differing_bytes=0)
