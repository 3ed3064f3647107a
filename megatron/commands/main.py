"""The command ``bloom``: ``bloom VERB ...`` does one thing around a run.

Several ranks are started by a launcher, which takes the command as a program or as a module:

    torchrun --nproc_per_node 2 --no_python bloom train ...
    torchrun --nproc_per_node 2 -m megatron.commands train ...
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import NoReturn

from megatron.cli import run_tool
from megatron.errors import ConfigError
from megatron.nearest import meant


@dataclass(frozen=True)
class Verb:
    """One thing that ``bloom`` does.

    Attributes:
        does: in a few words, for the list of verbs.
        module: which has the function.
        function: takes the arguments after the verb, and returns the exit code.
    """

    does: str
    module: str
    function: str = "main"

    def run(self, argv: Sequence[str]) -> int:
        """Do it; only now is its module imported."""
        exit_code: int = getattr(import_module(self.module), self.function)(argv)
        return exit_code


_HERE = "megatron.commands"

VERBS = {
    "corpus": Verb("collect a small corpus from Python's own library, to try", f"{_HERE}.corpus"),
    "tokenizer": Verb("train a tokenizer on text", f"{_HERE}.tokenizer"),
    "prepare": Verb("turn text into the token files that training reads", f"{_HERE}.prepare"),
    "plan": Verb("find the fastest layout of a run on a cluster", f"{_HERE}.plan"),
    "train": Verb("train a model, or go on with a run", f"{_HERE}.train"),
    "report": Verb("draw the curves of a run", f"{_HERE}.report"),
    "generate": Verb("continue texts with a save", f"{_HERE}.generate"),
    "export": Verb("write a save as a model that transformers opens", f"{_HERE}.export"),
    "verify": Verb("check that a save is as it was written", f"{_HERE}.saves", "verify"),
    "inspect": Verb("show what a save holds", f"{_HERE}.saves", "inspect"),
    "migrate": Verb("turn a launch script of Megatron-DeepSpeed into a config", f"{_HERE}.migrate"),
    "benchmark": Verb("measure speed and memory", f"{_HERE}.benchmark"),
    "version": Verb("print the versions of bloom, torch and Python", f"{_HERE}.version"),
}
"""By the words that choose them, in the order of a run."""

_START = """\
start here:
  bloom tokenizer --input text/ --vocab_size 32000 --output tokenizer.json
  bloom prepare --input text/ --tokenizer tokenizer.json --output data/text
  bloom train --config bloom-560m --data.paths.data/text 1.0 --data.tokenizer tokenizer.json
  bloom report runs/bloom-560m
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Do what ``bloom`` is asked for, and leave with an exit code of ``megatron.errors``."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:
        # It has an end of its own: signals are heeded before anything slow is imported.
        from megatron.commands.train import main as train

        train(words[1:])
    run_tool(lambda: run(words))


def run(words: Sequence[str]) -> int:
    """Do what the command line ``words`` asks for; return the exit code.

    Raises:
        ConfigError: if they begin with no verb.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return 0
    first, *rest = words
    if first in ("-V", "--version"):
        first = "version"
    if first not in VERBS:
        hint = meant(first, VERBS) or f"; the verbs are {', '.join(VERBS)}"
        raise ConfigError(f"bloom {first:.200}: is not a verb{hint}", on_every_rank=True)
    return VERBS[first].run(rest)


def overview() -> str:
    """What ``bloom --help`` prints."""
    width = max(map(len, VERBS))
    verbs = "".join(f"  {name:<{width}}  {verb.does}\n" for name, verb in VERBS.items())
    return (
        "usage: bloom VERB [option ...]\n\n"
        "Pretrain BLOOM-style language models, and work with what comes out.\n\n"
        f"verbs:\n{verbs}\n{_START}\n"
        "bloom VERB --help tells more of each. In options - and _ are the same.\n"
    )
