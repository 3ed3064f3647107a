"""What the environment says, and how ranks meet and part.

What goes wrong between ranks is in tests/integration: test_bad_input.py and test_resume.py.
"""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron.config import LaunchConfig
from megatron.errors import ConfigError, PeerError
from megatron.launch import RankEnvironment, launched, read_environment
from mpu import ParallelDims

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
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
        ("MASTER_PORT", None, "MASTER_PORT must be set with WORLD_SIZE 8"),
        ("MASTER_PORT", "http", "MASTER_PORT must be a whole number of at least 1, got 'http'"),
    ],
)
def test_wrong_variable_is_named(
    environment: pytest.MonkeyPatch, name: str, value: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(environment, **{**LAUNCHER, name: value})


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
