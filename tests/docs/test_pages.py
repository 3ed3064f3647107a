"""What the pages point to is there: links, paths, options and commands."""

import dataclasses
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import pytest

from megatron.config import Config
from megatron.errors import ConfigError
from tests.docs import commands
from tests.docs.pages import ROOT, anchor, blocks, headings, program, without_blocks

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
OURS = ("docs", "examples", "megatron", "mpu", "tests", "tools")


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def spans(name: str) -> list[str]:
    """What stands in code in the text of a page."""
    return [" ".join(it.split()) for it in re.findall(r"`([^`]+)`", without_blocks(text_of(name)))]


def links(name: str) -> list[str]:
    """The relative links of a page."""
    text = re.sub(r"`[^`]*`(?!\]\()", "", without_blocks(text_of(name)))
    return [it for it in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in it]


def is_sound(page: Path, link: str) -> bool:
    """Whether the file of a link is there, and its heading."""
    path, _, name = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return False
    return not name or name in map(anchor, headings(target.read_text()))


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_lead_somewhere(name: str) -> None:
    assert [link for link in links(name) if not is_sound(ROOT / name, link)] == []


def test_wrong_links_are_noticed() -> None:
    page = ROOT / "README.md"
    assert is_sound(page, "docs/metrics.md#definitions")
    assert not is_sound(page, "docs/metrics.md#no-such-heading")
    assert not is_sound(page, "docs/no-such-page.md")


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, new = set(), {ROOT / "README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        found = {(page.parent / link.partition("#")[0]).resolve() for link in links_of(page)}
        new |= {it for it in found if it.suffix == ".md"} - reached
    assert set(PAGES) <= reached


def links_of(page: Path) -> list[str]:
    return [link for link in links(page.relative_to(ROOT).as_posix()) if link[0] != "#"]


@pytest.mark.parametrize("name", NAMES)
def test_paths_that_are_named_are_there(name: str) -> None:
    paths = [it for it in spans(name) if re.fullmatch(rf"({'|'.join(OURS)})/[\w./-]*", it)]
    assert [it for it in paths if not (ROOT / it).exists()] == []


def option_names(config: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option, and every section, with its type."""
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        yield name, hint
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from option_names(hint, f"{name}.")


OPTIONS = dict(option_names(Config))
SECTIONS = [name for name, hint in OPTIONS.items() if dataclasses.is_dataclass(hint)]


def is_option(name: str) -> bool:
    parts = name.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts))]
    return name in OPTIONS or any(get_origin(OPTIONS.get(it)) is dict for it in above)


def named_options(text: str) -> list[str]:
    """What looks like an option of a section in a piece of code."""
    first = "|".join(it for it in SECTIONS if "." not in it)
    found = re.fullmatch(rf"(?:--)?((?:{first})\.[a-z_][\w.]*)(?:[= ].*)?", text)
    return [] if found is None or found[1].endswith((".py", ".md", ".yaml")) else [found[1]]


@pytest.mark.parametrize("name", NAMES)
def test_options_that_are_named_exist(name: str) -> None:
    options = [option for it in spans(name) for option in named_options(it)]
    assert [it for it in options if not is_option(it)] == []


def test_wrong_options_are_noticed() -> None:
    assert named_options("--train.micro_batch auto") == ["train.micro_batch"]
    assert not is_option("train.micro_batch")
    assert is_option("data.paths.data/text")


COMMANDS = [(name, command) for name in NAMES for command in commands.commands(text_of(name))]


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_understood(name: str) -> None:
    wrong = []
    for command in commands.commands(text_of(name)):
        try:
            commands.check(command)
        except (AssertionError, ConfigError, SystemExit) as error:
            wrong.append(f"{command}: {error}")
    assert wrong == []


@pytest.mark.parametrize(
    "command",
    [
        "python tools/report.py RUN --colour red",
        "python tools/no_such.py",
        "python -m tools.plan --config run.yaml",
        "torchrun --nproc 2 --no_such 1 pretrain_bloom.py --config run.yaml",
        "torchrun --nproc_per_node 2 pretrain_bloom.py --config run.yaml --parallel.tensors 2",
        "bloom trains --config run.yaml",
        "bash examples/no_such.sh",
        "pip install -c constraints.txt -e .[no_such]",
        "pytest tests/no_such",
        "rm -r runs",
    ],
)
def test_wrong_commands_are_noticed(command: str) -> None:
    with pytest.raises((AssertionError, ConfigError, SystemExit)):
        commands.check(command)


def test_readme_has_commands_of_every_kind() -> None:
    first = {command.split()[0] for name, command in COMMANDS if name == "README.md"}
    assert {"bash", "pip", "python", "torchrun"} <= first


def test_scripts_are_bash() -> None:
    scripts = sorted(path for name in OURS for path in (ROOT / name).rglob("*.sh"))
    assert scripts
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_python_blocks_are_python(name: str) -> None:
    compile(program(text_of(name)), name, "exec")


@pytest.mark.parametrize("name", NAMES)
def test_fences_are_closed(name: str) -> None:
    assert text_of(name).count("\n```") == 2 * len(list(blocks(text_of(name))))
