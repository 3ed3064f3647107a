"""What the environment says, and how ranks meet and part.

What goes wrong between ranks is in tests/integration: test_bad_input.py and test_resume.py.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron.config import LaunchConfig
from megatron.errors import ConfigError, PeerError
from megatron.launch import (
    RankEnvironment,
    export_for_deepspeed,
    launched,
    let_cause_be_seen,
    read_environment,
    take_local_rank,
)
from mpu import ParallelDims

ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
LAUNCHER = {"RANK": "3", "WORLD_SIZE": "8", **ADDRESS}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
TASK = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
VARIABLES = (*LAUNCHER, "LOCAL_RANK", *TASK)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    for name in VARIABLES:
        os.environ.pop(name, None)
    if dist.is_initialized():
        dist.destroy_process_group()


def read(environment: pytest.MonkeyPatch, **variables: str | None) -> RankEnvironment:
    for name, value in variables.items():
        if value is not None:
            environment.setenv(name, value)
    return read_environment()


def test_process_without_a_launcher_is_alone(environment: pytest.MonkeyPatch) -> None:
    assert read(environment) == RankEnvironment(0, 1, 0, None)


def test_launcher_tells_rank_and_address(environment: pytest.MonkeyPatch) -> None:
    assert read(environment, **LAUNCHER) == RankEnvironment(3, 8, 3, "node1:29500")


def test_local_rank_is_that_of_the_launcher(environment: pytest.MonkeyPatch) -> None:
    assert read(environment, **LAUNCHER, LOCAL_RANK="1").local_rank == 1


def test_one_rank_needs_no_address(environment: pytest.MonkeyPatch) -> None:
    assert read(environment, RANK="0", WORLD_SIZE="1") == RankEnvironment()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", None, "RANK must be a whole number of at least 0, got None"),
        ("RANK", "-1", "RANK must be a whole number of at least 0, got '-1'"),
        ("RANK", "8", r"RANK \(8\) must be below WORLD_SIZE \(8\)"),
        ("WORLD_SIZE", "0", "WORLD_SIZE must be a whole number of at least 1, got '0'"),
        ("LOCAL_RANK", "a", "LOCAL_RANK must be a whole number of at least 0, got 'a'"),
        ("MASTER_ADDR", None, "MASTER_ADDR must be set with WORLD_SIZE 8"),
        ("MASTER_ADDR", "", "MASTER_ADDR must be set with WORLD_SIZE 8; torchrun does so"),
        ("MASTER_PORT", None, "MASTER_PORT must be set with WORLD_SIZE 8"),
        ("MASTER_PORT", "http", "MASTER_PORT must be a whole number from 1 to 65535, got 'http'"),
        ("MASTER_PORT", "65536", "MASTER_PORT must be a whole number from 1 to 65535, got '65536'"),
    ],
)
def test_wrong_variable_is_named(
    environment: pytest.MonkeyPatch, name: str, value: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(environment, **{**LAUNCHER, name: value})


def test_task_of_srun_is_a_rank(environment: pytest.MonkeyPatch) -> None:
    assert read(environment, **TASK, **ADDRESS) == RankEnvironment(5, 8, 1, "node1:29500")


def test_script_of_a_slurm_job_is_no_rank(environment: pytest.MonkeyPatch) -> None:
    assert read(environment, **BATCH, **ADDRESS) == RankEnvironment()


def test_launcher_in_a_task_of_srun_is_believed(environment: pytest.MonkeyPatch) -> None:
    assert read(environment, **TASK, **LAUNCHER) == RankEnvironment(3, 8, 3, "node1:29500")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SLURM_PROCID", "8", r"SLURM_PROCID \(8\) must be below SLURM_NTASKS \(8\)"),
        ("SLURM_NTASKS", None, "SLURM_NTASKS must be a whole number of at least 1, got None"),
        ("SLURM_LOCALID", "x", "SLURM_LOCALID must be a whole number of at least 0, got 'x'"),
        ("MASTER_ADDR", None, "MASTER_ADDR must be set with SLURM_NTASKS 8; .*slurm.sbatch does"),
    ],
)
def test_wrong_variable_of_srun_is_named(
    environment: pytest.MonkeyPatch, name: str, value: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(environment, **{**TASK, **ADDRESS, name: value})


@pytest.mark.parametrize("spelling", ["--local_rank=1", "--local-rank=1", "--local_rank 1"])
def test_local_rank_of_deepspeed_is_taken_and_ignored(
    environment: pytest.MonkeyPatch, spelling: str
) -> None:
    environment.setenv("LOCAL_RANK", "1")
    argv = [*spelling.split(), "--data.paths", '{"a": 1.0}', "--train.samples=3"]
    assert take_local_rank(argv) == ["--data.paths", '{"a": 1.0}', "--train.samples=3"]
    assert read(environment, **LAUNCHER).local_rank == 1


def test_local_rank_of_deepspeed_counts_where_there_is_no_other(
    environment: pytest.MonkeyPatch,
) -> None:
    assert take_local_rank(["--local-rank", "1"]) == []
    assert read(environment, **LAUNCHER).local_rank == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--local_rank=2", r"^--local_rank \(2\) must be LOCAL_RANK \(1\)$"),
        ("--local-rank=-1", "^--local_rank must be a whole number of at least 0, got '-1'$"),
        ("--local_rank", "^--local_rank must be a whole number of at least 0, got ''$"),
    ],
)
def test_wrong_local_rank_of_deepspeed_is_refused(
    environment: pytest.MonkeyPatch, argument: str, message: str
) -> None:
    environment.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match=message):
        take_local_rank([argument])


def test_arguments_without_local_rank_stay_as_they_are() -> None:
    argv = ["--config", "run.yaml", "--local_ranks", "3", "--dry_run"]
    assert take_local_rank(argv) == argv
    assert "LOCAL_RANK" not in os.environ


def test_local_rank_is_told_to_libraries_once(environment: pytest.MonkeyPatch) -> None:
    export_for_deepspeed(RankEnvironment(5, 8, 1, "node1:29500"), torch.device("cpu"))
    assert os.environ["LOCAL_RANK"] == "1"
    export_for_deepspeed(RankEnvironment(5, 8, 2, "node1:29500"), torch.device("cpu"))
    assert os.environ["LOCAL_RANK"] == "1"


def enter(**config: object) -> None:
    with launched(lambda size: ParallelDims(), LaunchConfig(**config), RankEnvironment()) as launch:  # type: ignore[arg-type]
        assert (launch.rank, launch.world_size) == (0, 1)
        assert launch.device == torch.device("cpu")
        assert launch.groups.dims == ParallelDims()
        assert dist.get_backend() == "gloo"


def test_lone_process_has_groups_of_one_and_leaves_nothing_behind() -> None:
    enter(device="cpu")
    assert not dist.is_initialized()


def test_layout_is_asked_before_anybody_waits() -> None:
    environment = RankEnvironment(0, 2, 0, "no.such.host:1")

    def refuse(world_size: int) -> ParallelDims:
        raise ConfigError(f"not on {world_size} ranks")

    with (
        pytest.raises(ConfigError, match="not on 2 ranks"),
        launched(refuse, LaunchConfig(), environment),
    ):
        pytest.fail("entered")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_gpu_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match="launch.device cuda: .* this machine has 0"):
        enter(device="cuda")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("[/b/gloo/transport/pair.cc:53] Read error from 1: reset\nmore"),
            "Read.*set",
        ),
        (dist.DistNetworkError("timed out"), "timed out"),
    ],
)
def test_errors_of_lost_peers_keep_their_reason(error: Exception, reason: str) -> None:
    with pytest.raises(PeerError, match=f"was lost or did not answer: {reason}$"):
        fail(error)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="^a bug$"):
        fail(RuntimeError("a bug"))


def fail(error: Exception) -> None:
    with launched(lambda size: ParallelDims(), LaunchConfig(device="cpu"), RankEnvironment()):
        raise error


def test_rank_that_lost_another_leaves_after_it_was_noticed() -> None:
    started = time.monotonic()
    let_cause_be_seen()
    assert time.monotonic() - started > 1.0, "the deepspeed launcher looks once a second"


def test_leaving_writes_out_what_was_said_and_ends_at_once() -> None:
    program = """
import atexit, threading, time
from megatron.launch import leave
atexit.register(print, "never")
threading.Thread(target=time.sleep, args=(60,)).start()
print("last words", end="")
leave(8)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (8, "last words")
