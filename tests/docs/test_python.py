"""docs/python.md is a program that runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, program

PAGE = ROOT / "docs" / "python.md"


@pytest.mark.slow
def test_blocks_run_one_after_another(tmp_path: Path) -> None:
    file = tmp_path / "python.md.py"
    file.write_text(program(PAGE.read_text()))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, file],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    losses = re.search(r"^loss (\S+) to (\S+)$", done.stdout, re.M)
    assert losses is not None
    assert 5 < float(losses[1]) < 6, "ln 257 is 5.5"
    assert float(losses[2]) < 2
    guess = re.search(r"^a guess costs (\S+)$", done.stdout, re.M)
    assert guess is not None
    assert 5 < float(guess[1]) < 6
    assert re.search(r"^b'7 bottle", done.stdout, re.M)


def test_program_keeps_the_lines_of_the_page() -> None:
    page = PAGE.read_text().splitlines()
    lines = program(PAGE.read_text()).splitlines()
    code = [number for number, line in enumerate(lines) if line]
    assert len(code) > 40
    assert [lines[number] for number in code] == [page[number] for number in code]
