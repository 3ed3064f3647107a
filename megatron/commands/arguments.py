"""What the verbs of ``bloom`` share: how options are spelled, a run is named, output is kept."""

import os
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from megatron.errors import ConfigError
from megatron.nearest import meant
from megatron.spokesman import Spokesman


class CommandParser(ArgumentParser):
    """The command line of a verb.

    Options are taken with ``-`` for ``_`` too, and never shortened. What is wrong is a ConfigError,
    whose message ranks say once. Help is printed by one rank.

    Args:
        verb: the word that chooses it.
        does: one sentence, for the head of the help.
        examples: commands, for its end.
    """

    def __init__(self, verb: str, does: str, examples: Sequence[str]) -> None:
        super().__init__(
            prog=f"bloom {verb}",
            description=does,
            epilog="\n".join(["examples:", *(f"  {example}" for example in examples)]),
            allow_abbrev=False,
            formatter_class=RawDescriptionHelpFormatter,
        )

    def parse(self, argv: Sequence[str]) -> Namespace:
        """The values that ``argv`` gives.

        Raises:
            ConfigError: if it does not fit.
        """
        args, others = self.parse_some(argv)
        if others:
            name = others[0].partition("=")[0]
            if not name.startswith("-"):
                self.error(f"{name:.200} is one argument too many")
            self.error(f"{name:.200} is not an option{meant(name, self._names())}")
        return args

    def parse_some(self, argv: Sequence[str]) -> tuple[Namespace, list[str]]:
        """The values that ``argv`` gives, and the words that are for somebody else.

        Raises:
            ConfigError: if it does not fit.
        """
        return self.parse_known_args(self._spelled(argv))

    def _spelled(self, argv: Sequence[str]) -> list[str]:
        """``argv`` with each option spelled as it was added, up to a ``--``."""
        names = {_underscored(name): name for name in self._names()}
        end = argv.index("--") if "--" in argv else len(argv)
        words = []
        for word in argv[:end]:
            name, equals, value = word.partition("=")
            words.append(f"{names.get(_underscored(name), name)}{equals}{value}")
        return [*words, *argv[end:]]

    def _names(self) -> list[str]:
        return [name for name in self._option_string_actions if name.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments, as any other option."""
        raise ConfigError(f"{self.prog}: {message}; --help tells more", on_every_rank=True)

    def print_help(self, file: Any = None) -> None:
        Spokesman.of_process().say(partial(super().print_help, file))


def _underscored(name: str) -> str:
    return f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name


def add_run(parser: ArgumentParser) -> None:
    """Let the command line name a run or a save; ``run_of`` gives it."""
    named = parser.add_mutually_exclusive_group(required=True)
    named.add_argument(
        "run",
        nargs="?",
        type=Path,
        metavar="RUN",
        help="folder of a run, whose newest save is taken, or of a save: "
        "RUN/checkpoints/step-NNNNNNNN",
    )
    named.add_argument("--checkpoint", type=Path, metavar="RUN", help="the same, as it was called")


def run_of(args: Namespace) -> Path:
    """The folder of a run or of a save that the command line names."""
    path: Path = args.checkpoint if args.run is None else args.run
    return path


def add_overwrite(parser: ArgumentParser) -> None:
    """Let the command line allow that output takes the place of what is there."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what the output would take the place of"
    )


def check_output(args: Namespace, option: str, paths: Iterable[Path]) -> None:
    """Refuse to replace what is there, unless that is allowed. Call it before any work.

    Args:
        option: that names the output.
        paths: what will be written.

    Raises:
        ConfigError: for the first that is there.
    """
    if args.overwrite:
        return
    for path in paths:
        if os.path.lexists(path):
            raise ConfigError(
                f"{option}: {path} exists already; choose another name, or replace it with "
                "--overwrite",
                on_every_rank=True,
            )
