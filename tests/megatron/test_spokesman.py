"""One of several processes speaks, whichever comes first, and the others wait until it has."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.environment import find_launch
from megatron.spokesman import Spokesman
from tests.distributed import preload

_CONTEXT = multiprocessing.get_context("forkserver")
preload(__name__)

LAUNCH = "a launch"
PROCESSES = 6
MOST_SECONDS = 3.0


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def say(folder: Path, number: int, run: Callable[[Spokesman], None]) -> None:
    """Say one's number into a file."""
    import tempfile

    tempfile.tempdir = str(folder)
    spokesman = Spokesman(LAUNCH)
    run(spokesman)

    def speak() -> None:
        with (folder / "said").open("a") as file:
            file.write(f"{number}\n")

    spokesman.say(speak)
    assert (folder / "said").read_text(), "left before anybody had spoken"


def together(folder: Path, *runs: Callable[[Spokesman], None]) -> list[str]:
    """What processes have said that came at once."""
    processes = [
        _CONTEXT.Process(target=say, args=(folder, number, run)) for number, run in enumerate(runs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
    said = folder / "said"
    return said.read_text().split() if said.exists() else []


def a_moment_later(spokesman: Spokesman) -> None:
    """When all others have been started, as a rank takes longer to find what is wrong."""
    time.sleep(1.5)


def test_one_of_many_speaks(tmp_path: Path) -> None:
    assert len(together(tmp_path, *[a_moment_later] * PROCESSES)) == 1


def never_ends(spokesman: Spokesman) -> None:
    """A speaker that is killed when it has the word."""
    spokesman.say(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_another_speaks_for_one_that_was_killed(tmp_path: Path) -> None:
    assert len(together(tmp_path, never_ends, a_moment_later, a_moment_later)) == 1


def test_process_that_is_alone_always_speaks() -> None:
    said: list[int] = []
    for number in range(2):
        Spokesman(None).say(lambda number=number: said.append(number))  # type: ignore[misc]
    assert said == [0, 1]


def test_launches_do_not_silence_one_another() -> None:
    said: list[str] = []
    for launch in ("one", "two", "one"):
        Spokesman(launch).say(lambda launch=launch: said.append(launch))  # type: ignore[misc]
    assert said == ["one", "two"]


def test_what_an_earlier_run_said_silences_nobody(temporary: Path) -> None:
    """One that was started from the same shell, at the same port."""
    Spokesman(LAUNCH).say(lambda: None)
    (mark,) = (path for path in temporary.rglob("*") if path.is_file())
    mark.write_text("0.01\n")
    assert not Spokesman(LAUNCH).has_spoken()
    said: list[int] = []
    Spokesman(LAUNCH).say(lambda: said.append(1))
    assert said == [1]
    assert Spokesman(LAUNCH).has_spoken()


def test_rank_that_met_the_others_hears_one_that_had_not_yet() -> None:
    left, met = Spokesman(LAUNCH), Spokesman(LAUNCH)
    met.meet("a run", None)
    assert not met.has_spoken()
    left.say(lambda: None)
    assert met.has_spoken()
    met.say(lambda: pytest.fail("said twice"))


def test_ranks_of_a_run_are_silenced_by_no_start_that_came_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By mistake, from the same shell and at the port that is in use."""
    run, mistake = Spokesman(LAUNCH), Spokesman(LAUNCH)
    run.meet("a run", None)
    later = time.clock_gettime(time.CLOCK_BOOTTIME) + 60
    monkeypatch.setattr("megatron.spokesman._now", lambda: later)
    mistake.say(lambda: None)
    assert not run.has_spoken()


@pytest.mark.parametrize(("first", "said"), [(True, 1), (False, 0)])
def test_another_machine_is_asked_before_the_first_word(first: bool, said: int) -> None:
    words: list[int] = []
    spokesman = Spokesman(LAUNCH)
    spokesman.meet("a run", lambda: first)
    spokesman.say(lambda: words.append(1))
    assert len(words) == said


def test_machines_that_do_not_answer_silence_nobody() -> None:
    words: list[int] = []

    def lost() -> bool:
        raise ConnectionError

    for run, claim in (("lost", lost), ("slow", lambda: bool(time.sleep(30)))):
        spokesman = Spokesman(LAUNCH)
        spokesman.meet(run, claim)
        started = time.monotonic()
        spokesman.say(lambda: words.append(1))
        assert time.monotonic() - started < MOST_SECONDS
    assert words == [1, 1]


def test_folder_of_somebody_else_silences_nobody(temporary: Path) -> None:
    (temporary / "elsewhere").mkdir()
    (temporary / f"megatron-{os.getuid()}").symlink_to(temporary / "elsewhere")
    words: list[int] = []
    for _ in range(2):
        Spokesman(LAUNCH).say(lambda: words.append(1))
    assert words == [1, 1]
    assert list((temporary / "elsewhere").iterdir()) == []


def test_files_of_old_launches_are_removed(temporary: Path) -> None:
    Spokesman("old").say(lambda: None)
    (old,) = (path for path in temporary.rglob("*") if path.is_file())
    os.utime(old, (0, 0))
    Spokesman("new").say(lambda: None)
    assert not old.exists()


def test_ranks_of_a_launcher_have_its_launch_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(**variables: str) -> str | None:
        with monkeypatch.context() as patch:
            for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "TORCHELASTIC_RESTART_COUNT"):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            return find_launch()

    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "node", "MASTER_PORT": "1"}
    assert found() is None
    assert found(RANK="0", WORLD_SIZE="1") is None
    assert found(RANK="0", **ranks) == found(RANK="1", **ranks)
    assert found(RANK="0", **ranks) != found(RANK="0", **ranks, TORCHELASTIC_RESTART_COUNT="1")
    assert found(RANK="0", **ranks) != found(RANK="0", **{**ranks, "MASTER_PORT": "2"})
    task = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}
    assert found(SLURM_STEP_ID="0", **task) != found(SLURM_STEP_ID="1", **task)
