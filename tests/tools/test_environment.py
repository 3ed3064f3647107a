"""The scripts tell a Python, or an environment, that does not fit in one line, and make nothing.

The Pythons are small scripts that say the version of one, so that no other needs to be installed.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("tests/run.sh", "tests/lowest.sh", "examples/quickstart.sh")
FOLDERS = {"tests/lowest.sh": ".venv-lowest"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    for name in (*SCRIPTS, "tools/environment.sh"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def refusal(project: Path, script: str, path: Path, **environment: str) -> str:
    """The line that ``script`` refuses with, where ``path`` has the programs; nothing is made."""
    before = contents(project)
    done = subprocess.run(
        ["/bin/bash", script],
        cwd=project,
        env={"PATH": f"{path}:{tools(project)}", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert contents(project) == before
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def tools(project: Path) -> Path:
    """A folder with what the scripts call, but for a Python."""
    folder = project.parent / "tools"
    folder.mkdir(exist_ok=True)
    for name in ("dirname", "rm", "cat"):
        if not (folder / name).exists():
            (folder / name).symlink_to(shutil.which(name) or "")
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("version", ["2.7.18", "3.6.15", "3.9.18", "3.10.13"])
def test_a_python_that_is_too_old_is_told(project: Path, script: str, version: str) -> None:
    bin_ = project.parent / "bin"
    program(bin_ / "python3", f"echo {version}")
    said = refusal(project, script, bin_)
    assert f"Python 3.11 or newer is needed, but python3 is {version}; name another by" in said

    other = program(project.parent / "other", f"echo {version}")
    assert f"but {other} is {version}" in refusal(project, script, bin_, PYTHON=str(other))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("version", ["3.15.0", "3.20.1", "4.0.0"])
def test_a_python_that_torch_has_no_wheels_for_is_told(
    project: Path, script: str, version: str
) -> None:
    bin_ = project.parent / "bin"
    program(bin_ / "python3", f"echo {version}")
    assert (
        f"or older is needed, as torch has no wheel for a newer one, but python3 is {version};"
        in (refusal(project, script, bin_))
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_python_at_all_is_told(project: Path, script: str) -> None:
    bin_ = project.parent / "bin"
    assert "but there is no python3; name one by" in refusal(project, script, bin_)
    assert "but there is no python3.99;" in refusal(project, script, bin_, PYTHON="python3.99")
    for text in ("exit 127", "echo 'no such version' >&2; exit 1", "echo hello", "exit 0"):
        program(bin_ / "python3", text)
        assert "python3 does not start as one; name another" in refusal(project, script, bin_)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_without_the_module_venv_is_told(project: Path, script: str) -> None:
    bin_ = project.parent / "bin"
    program(bin_ / "python3", 'case "$2" in *version*) echo 3.12.1;; *) exit 1;; esac')
    assert "without its modules venv and ensurepip" in refusal(project, script, bin_)


def old(folder: Path) -> str:
    program(folder / "bin/python", "echo 3.9.18")
    return "was made by Python 3.9.18; remove it (rm -r "


def empty(folder: Path) -> str:
    folder.mkdir()
    return "is broken, or was never finished; remove it"


def dangling(folder: Path) -> str:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").symlink_to("/nowhere/python3")
    return "is broken, or was never finished; remove it"


def file(folder: Path) -> str:
    folder.write_text("")
    return "is broken, or was never finished; remove it"


def without_its_configuration(folder: Path) -> str:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").symlink_to(Path(sys.executable).resolve())
    return "is broken, or was never finished; remove it"


def without_pip(folder: Path) -> str:
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True, timeout=60)
    return "is broken, or was never finished; remove it"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "spoil", [old, empty, dangling, file, without_its_configuration, without_pip]
)
def test_an_environment_that_cannot_be_used_is_told(
    project: Path, script: str, spoil: Callable[[Path], str]
) -> None:
    name = FOLDERS.get(script, ".venv")
    said = spoil(project / name)
    assert f"{name} {said}" in refusal(project, script, project.parent / "bin")


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_python_than_the_one_of_the_environment_is_told(project: Path, script: str) -> None:
    name = FOLDERS.get(script, ".venv")
    (project / name).symlink_to(sys.prefix)
    other = program(project.parent / "other", "echo 3.14.0")
    if sys.version_info[:2] == (3, 14):
        other = program(project.parent / "other", "echo 3.13.0")
    said = refusal(project, script, project.parent / "bin", PYTHON=str(other))
    assert f"but {name} was made by Python 3." in said
    assert "or leave PYTHON out" in said


def test_the_python_that_is_used_as_installed_is_checked_too(project: Path) -> None:
    bin_ = project.parent / "bin"
    script = "examples/quickstart.sh"
    program(bin_ / "python", "echo 3.9.18")
    assert "but python is 3.9.18" in refusal(project, script, bin_, INSTALLED="1")
    other = program(project.parent / "other", "echo 3.10.1")
    said = refusal(project, script, bin_, INSTALLED="1", PYTHON=str(other))
    assert f"but {other} is 3.10.1" in said
