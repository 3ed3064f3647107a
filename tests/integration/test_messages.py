"""Whatever ends a run of several ranks, and whichever rank ends first, the user reads why, once.

The launcher ends all other ranks when it sees the first that has failed. Rank 0 is slow to start by
0, 0.5 or 2 s, so that it has not yet said a word when another leaves.
"""

import os
import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import DiskError
from megatron.training.reporter import Reporter
from tests.figures import Figure
from tests.integration import wrong_configs
from tests.integration.cases import Case
from tests.integration.runs import (
    base_argv,
    command,
    make_data,
    make_tokenizer,
    options,
    run_pretrain,
)

RANKS = 4
DELAYS = (0.0, 0.5, 2.0)
NUMBER = 40

# Python runs it at the start of every process of which PYTHONPATH names the folder.
SLOW_START = """
import os
import time

if os.environ.get("RANK") == "0" and "LOCAL_RANK" in os.environ:
    time.sleep(float(os.environ["SLOW_START"]))
"""


def usable(case: Case) -> bool:
    """Whether a case is a wrong option alone, of a run at any number of ranks."""
    return case.world_size == 1 and not case.env and case.ranks is None and case.exit_code == 2


WRONG: dict[str, Case] = {
    name: case
    for group in ("SIZES", "LAYOUTS", "VALUES", "FILES")
    for name, case in getattr(wrong_configs, group).items()
    if usable(case)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("messages")
    make_data(folder / "text")
    make_tokenizer(folder / "tokenizer.json")
    return folder


def arguments(folder: Path, case: Case) -> list[str]:
    argv = [*base_argv(folder), *options(train__global_batch_size=8), *options(**case.options)]
    return [argument.replace("FOLDER", str(folder)) for argument in [*argv, *case.argv]]


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if " ERROR " in line]


@pytest.mark.parametrize("delay", DELAYS)
def test_wrong_option_is_told_once(delay: float, folder: Path, figure: Figure) -> None:
    for name in random.Random(delay).sample(sorted(WRONG), 3):
        case = WRONG[name]
        case.before(folder)
        result = run_pretrain(
            arguments(folder, case), world_size=RANKS, delays={0: delay}, first_ends_all=True
        )
        assert len(errors(result.stderr)) == 1, (name, result.stderr)
        assert result.complaints == errors(result.stderr), name
    figure("causes told by forked ranks", told="3 of 3", delay=delay)


@pytest.mark.nightly
@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("name", random.Random(0).sample(sorted(WRONG), NUMBER))
def test_wrong_option_is_told_once_under_torchrun(
    name: str, delay: float, folder: Path, tmp_path: Path, figure: Figure
) -> None:
    WRONG[name].before(folder)
    started = time.monotonic()
    told = errors(under_torchrun(arguments(folder, WRONG[name]), tmp_path, delay))
    figure("wrong options under torchrun", told=len(told), seconds=time.monotonic() - started)
    assert len(told) == 1, told


def test_slow_rank_does_not_silence_torchrun(folder: Path, tmp_path: Path, figure: Figure) -> None:
    argv = [*base_argv(folder), *options(train__global_batch_size=6)]
    output = under_torchrun(argv, tmp_path, delay=2.0)
    assert len(errors(output)) == 1, output
    assert "train.global_batch_size (6)" in errors(output)[0]
    figure("causes told under torchrun", told="1 of 1", delay=2.0)


def under_torchrun(argv: list[str], place: Path, delay: float) -> str:
    """What torchrun and its ranks say, of which rank 0 is slow to start."""
    (place / "sitecustomize.py").write_text(SLOW_START)
    paths = f"{place}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        command(argv, world_size=RANKS),
        env={**os.environ, "PYTHONPATH": paths, "SLOW_START": str(delay), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Raise:
    """``rank`` alone raises an error at the end of a step; a bug is no error of ours."""

    rank: int
    bug: bool

    def arm(self) -> None:
        tell = Reporter.step
        message = " ".join(("broken", "by", "itself"))

        def tell_and_raise(self_: Reporter, *args: Any) -> None:
            tell(self_, *args)
            raise ArithmeticError(message) if self.bug else DiskError(message)

        setattr(Reporter, "step", tell_and_raise)  # noqa: B010


@pytest.mark.parametrize("bug", [False, True], ids=["error", "bug"])
@pytest.mark.parametrize("first_ends_all", [False, True], ids=["patient", "strict"])
def test_error_of_one_rank_is_told_once(
    bug: bool, first_ends_all: bool, folder: Path, tmp_path: Path
) -> None:
    argv = base_argv(folder, folder=tmp_path / "run", train__global_batch_size=8)
    result = run_pretrain(argv, world_size=2, fault=Raise(1, bug), first_ends_all=first_ends_all)
    assert result.exit_codes[1] == (1 if bug else 5), result.stderr
    assert result.stderr.count("broken by itself") == 1, result.stderr
    assert result.stderr.count("Traceback") == bug, result.stderr
    assert len(errors(result.stderr)) == (not bug), result.stderr


@pytest.mark.parametrize("delay", [0.0, 2.0])
def test_error_of_all_ranks_is_told_once(delay: float, folder: Path, tmp_path: Path) -> None:
    """Found when they have met: the data is not there."""
    argv = base_argv(folder, folder=tmp_path / "run", data__paths={str(tmp_path / "none"): 1.0})
    result = run_pretrain(
        [*argv, *options(train__global_batch_size=8)],
        world_size=RANKS,
        delays={0: delay},
        first_ends_all=True,
    )
    (told,) = errors(result.stderr)
    assert result.complaints == [told]
    assert str(tmp_path / "none") in told


@pytest.mark.parametrize("argument", ["--help=all", "--print-config"])
def test_help_is_printed_once(argument: str, folder: Path) -> None:
    result = run_pretrain([*base_argv(folder), argument], world_size=2)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    named = "  --launch.timeout" if argument == "--help=all" else "  timeout:"
    assert len([line for line in lines if line.startswith(named)]) == 1, result.stdout
