"""What a user can get wrong ends every rank soon, with its exit code and a message that helps, and
changes nothing in the run folder.

Each case is a run that must not train, with the words that its message has to have: the option or
the file, the value that was found, and the rule that it breaks.
"""

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.figures import Figure
from tests.integration import wrong_configs, wrong_files
from tests.integration.cases import CONFIG, PEER, Case
from tests.integration.runs import (
    base_argv,
    command,
    contents,
    make_data,
    make_tokenizer,
    processes_with,
    run_pretrain,
)

MOST_LINES = 5
MOST_SECONDS = 10.0

GROUPS: dict[str, dict[str, Case]] = {
    "size": wrong_configs.SIZES,
    "layout": wrong_configs.LAYOUTS,
    "deepspeed": wrong_configs.DEEPSPEED,
    "value": wrong_configs.VALUES,
    "config": wrong_configs.FILES,
    "data": wrong_files.DATASETS,
    "save": wrong_files.SAVES,
    "machine": wrong_files.MACHINES,
}
CASES = {
    f"{group}: {name}": case for group, cases in GROUPS.items() for name, case in cases.items()
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a tokenizer and a run of two steps with its saves."""
    folder = tmp_path_factory.mktemp("trained")
    make_data(folder / "text")
    make_tokenizer(folder / "tokenizer.json")
    argv = base_argv(folder, train__samples=8, checkpoint__save_interval=1)
    assert run_pretrain(argv).exit_code == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A folder of its own for each case."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_with_one_helpful_message(name: str, folder: Path, figure: Figure) -> None:
    case = CASES[name]
    if case.fresh:
        shutil.rmtree(folder / "run")
    case.before(folder)
    before = contents(folder / "run")
    argv = [
        argument.replace("FOLDER", str(folder))
        for argument in [*base_argv(folder, **case.options), *case.argv]
    ]
    result = run_pretrain(argv, world_size=case.world_size, env=case.env, ranks=case.ranks)
    assert result.exit_code == case.exit_code, result.stderr
    assert 1 <= len(result.complaints) <= MOST_LINES, result.stderr
    assert "Traceback" not in result.stderr
    message = " ".join(result.complaints)
    assert message.count(" ERROR ") == 1
    words = case.words.replace("FOLDER", str(folder)).split("|")
    assert [part for part in words if part not in message] == [], message
    assert result.seconds < MOST_SECONDS
    assert not (folder / "owned").exists()
    assert contents(folder / "run") == before, "a refused start changes nothing"
    figure("bad input", lines=len(result.complaints), seconds=result.seconds)


def test_port_in_use_ends_both_ranks(folder: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        argv = base_argv(folder)
        result = run_pretrain(argv, world_size=2, env={"MASTER_PORT": str(port)})
    # The second rank cannot know that what listens is not the first, until the first has said so.
    assert result.exit_codes == [CONFIG, PEER]
    assert len(result.complaints) == 1, result.stderr
    assert f"MASTER_PORT: 127.0.0.1:{port} is in use" in result.complaints[0]
    assert result.seconds < MOST_SECONDS


def test_started_program_ends_with_the_code_and_the_message(folder: Path) -> None:
    done = start(command(base_argv(folder, train__dtype="fp12")))
    assert done.returncode == CONFIG
    assert done.stdout == ""
    assert done.stderr.endswith("train.dtype must be one of fp32, bf16, fp16, fp64, got 'fp12'\n")


def test_launched_ranks_end_with_one_message(folder: Path) -> None:
    (folder / "text.bin").write_bytes(b"")
    done = start(command(base_argv(folder), world_size=2))
    assert done.returncode == 1, "torchrun's own"
    assert done.stderr.count("text.bin: has 0 bytes") == 1
    assert processes_with(str(folder)) == []


def start(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_many_mistakes_were_made() -> None:
    assert len(CASES) >= 30
