"""What is read is data: a canary in every field of every format does not sing.

The campaign is a program of its own, which forks a process for each case.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron.errors import ConfigError
from tests.figures import Figure
from tests.hostile.canaries import SECRET, Outside
from tests.hostile.formats import CONFIG, Case
from tests.hostile.walk import places, put, put_key

ROOT = Path(__file__).parents[2]
SAMPLE = 20


def campaign(*argv: str) -> dict[str, Any]:
    """The figures of a campaign, of which every canary was refused or stayed data."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.campaign", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert (figures["executed"], figures["touched"], figures["unsound"]) == (0, 0, 0)
    return figures


def test_canaries_in_what_is_read_are_refused_or_stay_data(figure: Figure) -> None:
    figures = campaign("--count", str(SAMPLE))
    assert figures["canaries"] == SAMPLE
    assert figures["refused"] > SAMPLE / 3
    figure("hostile input, a sample", **figures)


@pytest.mark.nightly
def test_all_canaries_are_refused_or_stay_data(figure: Figure) -> None:
    figures = campaign()
    assert figures["refused"] >= 300
    assert figures["formats"] >= 12
    figure("hostile input", **figures)


def test_a_canary_that_sings_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not at the head: it imports all programs.
    from tests.hostile.campaign import judge

    outside, specimen = Outside(tmp_path / "outside"), tmp_path / "specimen"
    outside.make()
    specimen.mkdir()
    for kind, sin in {
        "executed": outside.mark.touch,
        "touched": lambda: outside.secret.write_text("x"),
        "read": lambda: (tmp_path / "case" / "copy").write_text(SECRET),
        "unsound": lambda: 1 // 0,
        "escaped": lambda: os.write(1, b"\x1b[31m"),
        "refused": refuse,
        "harmless": lambda: None,
    }.items():
        sinner = ModuleType("tools.sinner")
        setattr(sinner, "main", lambda _, sin=sin: bool(sin()) and 0)  # noqa: B010
        monkeypatch.setitem(sys.modules, "tools.sinner", sinner)
        case = Case("a format", kind, lambda _: None, "sinner", lambda _: [], (CONFIG,))
        assert judge(case, specimen, outside, tmp_path / "case").kind == kind


def refuse() -> None:
    raise ConfigError("no")


def test_every_place_of_a_structure_is_found() -> None:
    value = {"a": {"b": [1, {"c": 2}]}, "d": [{"e": 3}]}
    found = list(places(value))
    assert found == [
        ("a",),
        ("a", "b"),
        ("a", "b", 0),
        ("d",),
        ("d", 0),
        ("d", 0, "e"),
    ]
    assert put(value, ("d", 0, "e"), 4)["d"] == [{"e": 4}]
    assert put_key(value, ("a", "b"), "x")["a"] == {"x": [1, {"c": 2}]}
    assert value == {"a": {"b": [1, {"c": 2}]}, "d": [{"e": 3}]}
