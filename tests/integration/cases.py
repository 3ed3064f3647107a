"""How a wrong run is described; the runs themselves are in wrong_configs and wrong_files."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

CONFIG, DATA, CHECKPOINT, DISK, PEER = 2, 3, 4, 5, 8
SAVE = "run/checkpoints/step-00000002"
"""The newest save in a folder that was trained in."""

Action: TypeAlias = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A wrong run.

    Attributes:
        words: what the message must have, parted by bars.
        exit_code: of every rank.
        options: what is given besides or instead of ``base_argv``; FOLDER stands for the folder.
        argv: further arguments.
        before: what is done to the folder, which holds good data and a tokenizer.
        env: variables besides those of a launcher, or instead of them.
        fresh: the folder holds no run; else one of two steps, with a save of each.
        ranks: those that are started; None is all.
    """

    words: str
    exit_code: int = CONFIG
    options: dict[str, object] = field(default_factory=dict)
    argv: tuple[str, ...] = ()
    before: Action = lambda folder: None
    env: dict[str, str] = field(default_factory=dict)
    world_size: int = 1
    fresh: bool = False
    ranks: tuple[int, ...] | None = None


def changed(words: str, *, world_size: int = 1, **options: object) -> Case:
    """A configuration that is refused."""
    return Case(words, options=options, world_size=world_size)


def yaml(words: str, text: str) -> Case:
    """A configuration file that is refused."""
    return Case(
        words,
        argv=("--config", "FOLDER/run.yaml"),
        before=lambda folder: (folder / "run.yaml").write_text(text),
    )


def data(words: str, before: Action = lambda folder: None, **options: object) -> Case:
    """Data that is refused, also by a run that would go on with other data than before."""
    return Case(words, DATA, {"checkpoint__accept_new_data": True, **options}, before=before)


def resumed(words: str, before: Action = lambda folder: None, **options: object) -> Case:
    """A run that may not go on from the saves in its folder."""
    return Case(words, CHECKPOINT, options, before=before)
