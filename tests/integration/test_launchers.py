"""Every launcher trains the same run by the files of examples/launch, and ends it if a rank fails.

Two ranks share this machine. Where an example is for several machines, each rank is on one of its
own: a launcher of its own on loopback. What only a cluster has, srun and the variables of a pod, is
stood in for.
"""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import pytest
import yaml

from megatron.config import config_to_dict, load_config
from tests.figures import Figure
from tests.integration.runs import base_argv, free_port, make_data, processes_with, records, values

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/launch"
LOOPBACK = "127.0.0.1"
NODES = range(2)

STEPS = 5
ROUNDING = 1e-12
TIMEOUT = 180.0
MOST_SECONDS = 30.0


@dataclass(frozen=True)
class Command:
    """A launcher on one machine."""

    words: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)


Launcher: TypeAlias = Callable[[Path, Sequence[str]], list[Command]]


def example(name: str, arguments: Sequence[str], **variables: object) -> Command:
    """A script of examples/launch."""
    texts = {variable: str(value) for variable, value in variables.items()}
    return Command(["bash", str(EXAMPLES / name), *arguments], texts)


def single(folder: Path, arguments: Sequence[str]) -> list[Command]:
    return [example("single.sh", arguments)]


def torchrun(folder: Path, arguments: Sequence[str]) -> list[Command]:
    return [example("torchrun.sh", arguments, RANKS=2)]


def torchrun_nodes(folder: Path, arguments: Sequence[str]) -> list[Command]:
    place = {"NODES": 2, "MASTER_ADDR": LOOPBACK, "MASTER_PORT": free_port(), "RANKS": 1}
    return [
        example("torchrun_nodes.sh", arguments, **place, NODE_RANK=node_rank) for node_rank in NODES
    ]


def deepspeed(folder: Path, arguments: Sequence[str]) -> list[Command]:
    return [example("deepspeed.sh", arguments, RANKS=2, MASTER_PORT=free_port())]


def deepspeed_nodes(folder: Path, arguments: Sequence[str]) -> list[Command]:
    place = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": free_port(), "RANKS": 1}
    hosts = {"HOSTFILE": EXAMPLES / "hostfile"}
    return [
        example("deepspeed.sh", arguments, **hosts, **place, NODE_RANK=node_rank)
        for node_rank in NODES
    ]


SRUN = f"""#!{sys.executable}
import os, subprocess, sys
options = [word.startswith("--") for word in sys.argv[1:]]
command = sys.argv[1 + options.index(False):]
tasks = int(os.environ["SLURM_NTASKS"])
task = {{"SLURM_STEP_ID": "0", "SLURM_LOCALID": "0"}}
ranks = [
    subprocess.Popen(command, env={{**os.environ, **task, "SLURM_PROCID": str(rank)}})
    for rank in range(tasks)
]
sys.exit(max(rank.wait() for rank in ranks))
"""
SCONTROL = f"""#!/bin/sh
echo {LOOPBACK}
echo another.host
"""


def slurm(folder: Path, arguments: Sequence[str]) -> list[Command]:
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": os.getpid(), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": 2}
    # The script of a job looks like a task itself.
    batch = {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_CPUS_PER_TASK": 1}
    path = f"{programs}:{search_path()}"
    return [example("slurm.sbatch", arguments, **job, **batch, PATH=path)]


def kubernetes(folder: Path, arguments: Sequence[str]) -> list[Command]:
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    changes = {"CONFIG": options["--config"], "FOLDER": options["--folder"], "RANKS": "1"}
    pods = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())["spec"]["pytorchReplicaSpecs"]
    assert {kind: pod["replicas"] for kind, pod in pods.items()} == {"Master": 1, "Worker": 1}
    # What the operator sets.
    job = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    commands = []
    for rank, kind in enumerate(("Master", "Worker")):
        (container,) = pods[kind]["template"]["spec"]["containers"]
        own = {variable["name"]: variable["value"] for variable in container["env"]}
        words = [*container["command"], *container["args"]]
        commands.append(Command(words, {**own, **changes, **job, "RANK": str(rank)}))
    return commands


@dataclass(frozen=True)
class Result:
    """How the launchers of a run ended.

    Attributes:
        exit_codes: of the launcher on each machine.
        output: all that they and their ranks said.
        ended: when the last of them did, as ``time.time`` tells it.
    """

    exit_codes: list[int]
    output: str
    ended: float


def launch(launcher: Launcher, folder: Path, **variables: str) -> Result:
    """Train by ``launcher`` with the configuration in ``folder``, in a folder of its name in there.

    Args:
        variables: those that all machines have besides their own.
    """
    run = launcher.__name__
    arguments = ["--config", str(folder / "run.yaml"), "--folder", str(folder / run)]
    logs = [folder / f"{run}-{node_rank}.log" for node_rank in NODES]
    commands = launcher(folder, arguments)
    processes = [
        start(command, log, variables) for command, log in zip(commands, logs, strict=False)
    ]
    try:
        exit_codes = [process.wait(TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    output = "".join(log.read_text() for log in logs if log.exists())
    return Result(exit_codes, output, time.time())


def start(command: Command, log: Path, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    own = {"PATH": search_path(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **own, **command.variables, **variables}
    with log.open("wb") as file:
        return subprocess.Popen(
            command.words, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT
        )


def search_path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a configuration of five steps, and what plain python makes of it."""
    folder = tmp_path_factory.mktemp("launchers")
    make_data(folder / "text")
    config = load_config(base_argv(folder, train__samples=4 * STEPS))
    (folder / "run.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    result = launch(single, folder)
    assert result.exit_codes == [0], result.output
    assert len(values(folder / single.__name__, "loss")) == STEPS
    return folder


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


@pytest.mark.parametrize(
    "launcher", [slurm, kubernetes, pytest.param(deepspeed_nodes, marks=needs_deepspeed)]
)
def test_example_trains_what_plain_python_trains(
    launcher: Launcher, folder: Path, figure: Figure
) -> None:
    started = time.time()
    result = launch(launcher, folder)
    assert set(result.exit_codes) == {0}, result.output
    worst = compare_losses(folder, launcher.__name__)
    seconds = result.ended - started
    figure(f"launched by {launcher.__name__}", worst_relative_to_python=worst, seconds=seconds)


def compare_losses(folder: Path, run: str) -> float:
    """Hold the losses of a run on two ranks against those of plain python."""
    (start,) = records(folder / run, "start")
    assert start["world_size"] == 2
    mine, plain = (values(folder / name, "loss") for name in (run, single.__name__))
    assert mine == pytest.approx(plain, rel=ROUNDING, abs=0.0)
    return max(abs(a / b - 1) for a, b in zip(mine, plain, strict=True))


# Python runs it at the start of every process of which PYTHONPATH names the folder.
FAULT = """
import os

if os.environ.get("RANK") == "1" and "LOCAL_RANK" in os.environ:
    import time
    from pathlib import Path

    from megatron.errors import DiskError
    from megatron.training.reporter import Reporter

    tell = Reporter.step

    def tell_and_fail(self, progress, *args):
        tell(self, progress, *args)
        if progress.step == STEPS:
            Path(__file__).with_name("time").write_text(str(time.time()))
            raise ERROR(" ".join(("rank 1", "alone")))

    Reporter.step = tell_and_fail
"""


@pytest.mark.parametrize(
    ("launcher", "error", "report", "exit_codes"),
    [
        (torchrun, "DiskError", "failed (exitcode: 5)", [1]),
        (torchrun_nodes, "ArithmeticError", "failed (exitcode: 1)", [1, 1]),
        pytest.param(
            deepspeed, "DiskError", "exits with return code = 5", [5], marks=needs_deepspeed
        ),
    ],
)
def test_example_trains_and_ends_when_a_rank_fails(
    launcher: Launcher,
    error: str,
    report: str,
    exit_codes: list[int],
    folder: Path,
    figure: Figure,
) -> None:
    run = launcher.__name__
    fault = folder / f"fault-{run}"
    fault.mkdir()
    text = FAULT.replace("ERROR", error).replace("STEPS", str(STEPS))
    (fault / "sitecustomize.py").write_text(text)
    result = launch(launcher, folder, PYTHONPATH=f"{fault}:{ROOT}")
    worst = compare_losses(folder, run)
    assert result.exit_codes == exit_codes, result.output
    assert result.output.count("rank 1 alone") == 1, result.output
    assert report in result.output, "the launcher tells of the rank that failed by itself"
    assert processes_with(str(folder / run)) == []
    seconds = result.ended - float((fault / "time").read_text())
    assert seconds < MOST_SECONDS
    figure(f"launched by {run}", worst_relative_to_python=worst, seconds_after_failure=seconds)
