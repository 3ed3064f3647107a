"""A run of the original on its way to a config: what was given, and what has been found of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.rules import require_multiple
from megatron.migration.deepspeed_json import DeepSpeedJson
from megatron.migration.shell import open_parts, shown
from megatron.migration.values import Flags, Notes, Reader, Settings, about_open
from megatron.plain import leads_out

DEFAULT = "the original's default"
"""The source of what no flag says."""


@dataclass(frozen=True)
class Original:
    """A run of the original.

    Attributes:
        name: what the run may be called.
        flags: those of the training program.
        deepspeed: DeepSpeed's JSON, if it is there.
        world_size: number of ranks, if it is known.
        vocab_size: size of the vocabulary, if somebody has told it.
        folder: where the names of files start.
        typed: whether somebody has typed the flags; a script may name files of its folder only.
        commands: different ones in the script that start the training; these are the last one's.
    """

    name: str
    flags: Flags
    deepspeed: DeepSpeedJson | None = None
    world_size: int | None = None
    vocab_size: int | None = None
    folder: Path = Path()
    typed: bool = True
    commands: int = 1


@dataclass(frozen=True)
class Migration:
    """What has been found so far.

    Attributes:
        extra: what of DeepSpeed's JSON is left for DeepSpeed, by dotted names.
    """

    original: Original
    settings: Settings = field(default_factory=Settings)
    notes: Notes = field(default_factory=Notes)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def flags(self) -> Flags:
        return self.original.flags

    @property
    def uses_deepspeed(self) -> bool:
        return "deepspeed" in self.flags or self.original.deepspeed is not None

    @property
    def data_size(self) -> int | None:
        """Data ranks, if the number of ranks is known."""
        world_size = self.original.world_size
        if world_size is None:
            return None
        tensor = self.settings.get("parallel.tensor", 1)
        pipeline = self.settings.get("parallel.pipeline", 1)
        name = "--tensor-model-parallel-size x --pipeline-model-parallel-size"
        require_multiple("the number of ranks", world_size, name, tensor * pipeline)
        return world_size // (tensor * pipeline)

    def take(self, flag: str, option: str, read: Reader, times: float = 1) -> None:
        """Give an option the value of a flag, times a factor, if the flag is there."""
        if flag in self.flags:
            value = self.flags.one(flag, read)
            self.settings.give(
                option, value if times == 1 else round(value * times), self.flags.written(flag)
            )

    def lose(self, flag: str, why: str) -> None:
        """Note that a flag, if it is there, has no equal here."""
        if flag in self.flags:
            self.notes.add("lost", self.flags.written(flag), why)

    def skip(self, flag: str, why: str) -> None:
        """Note that a flag, if it is there, is not needed here."""
        if flag in self.flags:
            self.notes.add("not needed", self.flags.written(flag), why)

    def is_open(self, flag: str) -> bool:
        """Whether the values of a flag are not known; if so, that is noted as something to do."""
        parts = [part for value in self.flags.values(flag) for part in open_parts(value)]
        if parts:
            self.notes.add("to do", self.flags.written(flag), about_open(parts[0]))
        return bool(parts)

    def path(self, name: str) -> Path | None:
        """A file that the original names, if it is here.

        What a script names is looked for in the script's folder and below, and nowhere else.
        """
        return named_file(self.original.folder, shown(name), typed=self.original.typed)


def named_file(folder: Path, name: str, *, typed: bool) -> Path | None:
    """The file or folder ``name`` in ``folder``, if it is there; elsewhere only if it was typed."""
    path = folder / name
    try:
        here = path.exists() and (typed or leads_out(path, folder) is None)
    except (OSError, ValueError):
        # No path at all, such as one with a zero byte.
        return None
    return path if here else None
