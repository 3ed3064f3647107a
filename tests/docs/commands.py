"""Whether the commands of a page would be understood, by the parsers that they meet.

A tool's ``main`` is called with its arguments and stopped as soon as these are read. What the text
only names, without arguments, has to be there.
"""

import argparse
import importlib
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

from torch.distributed.run import get_args_parser

from megatron.commands.main import VERBS
from megatron.config import load_config
from megatron.planning.report import take_request
from tests.docs.pages import ROOT, Block, blocks

PROGRAMS = ("bash", "bloom", "pip", "python", "pytest", "ruff", "torchrun")
"""A command in the text begins with one of these."""
TOOLS_OF_THE_SYSTEM = ("cp", "kill", "source")
_CONFIG = str(ROOT / "examples" / "configs" / "quickstart.yaml")
_READ = argparse.ArgumentParser.parse_known_args


class ParsedError(BaseException):
    """The arguments are read, and understood."""


def commands(text: str) -> list[str]:
    """All commands of a page: those in blocks of bash, and those in its text."""
    found = [it for block in blocks(text) if block.language == "bash" for it in _lines(block)]
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    words = (" ".join(it.split()) for it in spans)
    return found + [it for it in words if " " in it and it.split()[0] in PROGRAMS]


def _lines(block: Block) -> list[str]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def check(command: str) -> None:
    """Fail unless every part of ``command`` is there and its options are understood."""
    for part in re.split(r" && ", command):
        words = shlex.split(part, comments=True)
        while re.match(r"\w+=", words[0]):
            words.pop(0)
        _check_words([words[0].removeprefix(".venv/bin/"), *words[1:]])


def _check_words(words: Sequence[str]) -> None:
    program, *args = words
    if program == "torchrun":
        if not any(word.endswith((".py", "bloom")) for word in args):
            # Named in the text, for an option of its own.
            known = get_args_parser()._option_string_actions
            assert {it for it in args if it.startswith("--")} <= set(known)
            return
        launch = get_args_parser().parse_args(args)
        script = [launch.training_script, *launch.training_script_args]
        _check_words(script if launch.no_python else ["python", *["-m"] * launch.module, *script])
    elif program == "python":
        _check_python(args)
    elif program == "bloom":
        _check_verb(args)
    elif program == "bash":
        _check_script(args)
    elif program == "pip":
        _check_install(args)
    elif program == "pytest":
        _check_paths(args)
    else:
        assert program in ("ruff", *TOOLS_OF_THE_SYSTEM), f"{program}: not known"


def _check_python(args: Sequence[str]) -> None:
    first, *rest = args
    if first == "pretrain_bloom.py":
        _check_training(rest)
    elif first == "-m" and rest[0] == "pytest":
        _check_paths(rest[1:])
    elif first == "-m" and rest[0] == "megatron.commands":
        _check_verb(rest[1:])
    elif first == "-m":
        assert importlib.util.find_spec(rest[0]) is not None, rest[0]
        if rest[0] not in ("mypy", "venv") and not rest[0].startswith("tests."):
            _check_tool(rest[0], rest[1:])
    elif "/" in first:
        assert (ROOT / first).is_file(), first
        _check_tool(first.removesuffix(".py").replace("/", "."), rest)


def _check_verb(args: Sequence[str]) -> None:
    verb, *rest = args
    if verb in ("--help", "VERB"):
        # The list of verbs, and any of them.
        return
    assert verb in VERBS, verb
    if verb == "train":
        _check_training(rest)
    else:
        _check_tool(VERBS[verb].module, rest, VERBS[verb].function)


def _check_training(args: Sequence[str]) -> None:
    """A config that is made by an earlier command stands for that of the quickstart."""
    if args in ([], ["..."]):
        # Named in the text, with or without its place for arguments.
        return
    _, options = take_request(args)
    words = list(options)
    if not {"--help", "--print_config"} & set(words):
        for place, word in enumerate(options):
            given = options[place - 1] == "--config" and word.endswith(".yaml")
            if given and not (ROOT / word).is_file():
                words[place] = _CONFIG
                words += ["--folder", "runs/it"]
    with suppress(SystemExit):
        # Help and a config that is printed end so.
        load_config(words)


def _check_tool(module: str, args: Sequence[str], function: str = "main") -> None:
    main = getattr(importlib.import_module(module), function)
    if not args:
        # Named in the text, or one that needs none.
        return
    with patch.object(argparse.ArgumentParser, "parse_known_args", _read_and_stop):
        try:
            main(list(args))
        except ParsedError:
            return
        except SystemExit:
            if "--help" in args:
                return
            raise
    raise AssertionError(f"{module} does not read its arguments by a parser")


def _read_and_stop(
    parser: argparse.ArgumentParser,
    args: Sequence[str] | None = None,
    namespace: argparse.Namespace | None = None,
) -> None:
    assert args is not None, "a tool reads the arguments that it is given"
    _, others = _READ(parser, args, namespace)
    assert not others, f"not understood: {others}"
    raise ParsedError


def _check_script(args: Sequence[str]) -> None:
    script, *rest = args
    if script == "-c":
        return
    assert (ROOT / script).is_file(), script
    if Path(script).parent.name == "launch":
        _check_training(rest)
    elif script == "tests/run.sh":
        _check_paths(rest)


def _check_paths(args: Sequence[str]) -> None:
    for word in args:
        if word.startswith("tests"):
            assert (ROOT / word).exists(), word


def _check_install(args: Sequence[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert args[0] == "install"
    for before, word in zip(args, args[1:], strict=False):
        if before == "-c":
            assert (ROOT / word).is_file(), word
        extra = re.fullmatch(r"\.\[(\w+)\]", word)
        if extra:
            assert extra[1] in project["optional-dependencies"], extra[1]
