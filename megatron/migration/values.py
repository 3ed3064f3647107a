"""Values from several places, and what there is to say of them.

``Settings`` holds what each option is to be, and where that comes from. Two places that say
different things are an error that names both. ``Notes`` holds what a reader has to know besides.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from megatron.errors import ConfigError
from megatron.migration.shell import open_parts, shown

Reader: TypeAlias = Callable[[str], Any]
"""From the text of a value to the value; raises ValueError, with what it should be."""

Kind: TypeAlias = Literal["lost", "to do", "different", "not needed"]


@dataclass(frozen=True)
class Setting:
    """The value of an option, and where it comes from."""

    value: Any
    source: str


@dataclass(frozen=True)
class Note:
    """Something to say: of what, and what."""

    kind: Kind
    name: str
    text: str


class Settings:
    """What each option is to be, by its dotted name."""

    def __init__(self) -> None:
        self._found: dict[str, Setting] = {}

    def __contains__(self, option: str) -> bool:
        return option in self._found

    def __getitem__(self, option: str) -> Any:
        return self._found[option].value

    def items(self) -> Iterator[tuple[str, Setting]]:
        yield from self._found.items()

    def get(self, option: str, default: Any = None) -> Any:
        """The value of ``option``, or ``default``."""
        return self._found[option].value if option in self._found else default

    def give(self, option: str, value: Any, source: str) -> None:
        """Set an option.

        Raises:
            ConfigError: if another source has given it another value.
        """
        old = self._found.setdefault(option, Setting(value, source))
        if old.value != value:
            raise ConfigError(f"{old.source} contradicts {source}; make them agree")

    def replace(self, option: str, value: Any, source: str) -> None:
        """Set an option, whatever it has been."""
        self._found[option] = Setting(value, source)

    def drop(self, option: str) -> None:
        self._found.pop(option, None)


@dataclass
class Notes:
    """What there is to say, in the order in which it was found."""

    all: list[Note] = field(default_factory=list)

    def add(self, kind: Kind, name: str, text: str) -> None:
        self.all.append(Note(kind, name, text))

    def of(self, kind: Kind) -> list[Note]:
        return [note for note in self.all if note.kind == kind]


class Flags:
    """The flags of a command line, as Megatron's parser reads them: the last of a name counts."""

    def __init__(self, words: Sequence[str]) -> None:
        self.stray: list[str] = []
        self._values: dict[str, list[str]] = {}
        values = self.stray
        for word in words:
            if not word.startswith("--"):
                values.append(word)
                continue
            name, has_value, value = word[2:].partition("=")
            values = self._values[name] = [value] if has_value else []

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def values(self, name: str) -> list[str]:
        """The values of a flag, none if it is not there."""
        return self._values.get(name, [])

    def written(self, name: str) -> str:
        """A flag as it stands on the command line, shortened if it is long."""
        text = " ".join(shown(" ".join([f"--{name}", *self.values(name)])).split())
        return text if len(text) <= 60 else f"{text[:57]}..."

    def one(self, name: str, read: Reader) -> Any:
        """The only value of a flag that is there.

        Raises:
            ConfigError: if it has not one value, or another than ``read`` takes.
        """
        if len(self.values(name)) != 1:
            raise ConfigError(f"--{name} must have one value, got '{self.written(name)}'")
        return self.read(name, self.values(name)[0], read)

    def read(self, name: str, text: str, read: Reader) -> Any:
        """One of the values of a flag.

        Raises:
            ConfigError: if it is open, or another than ``read`` takes.
        """
        for part in open_parts(text):
            raise ConfigError(f"--{name} {shown(text)}: {about_open(part)}")
        try:
            return read(text)
        except ValueError as error:
            raise ConfigError(f"--{name} must be {error}, got '{text}'") from error


def about_open(part: str) -> str:
    """Why something in a script is open, and what to do about it."""
    gives = "give the flag with its value after --"
    if part.startswith("$") and part[1:].isidentifier():
        gives = f"give it with --set {part[1:]}=VALUE"
    return f"{part} has no value in the script, or one that depends on a condition; {gives}"


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError("a whole number") from error


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError("a number") from error


def text_itself(text: str) -> str:
    return text


def one_of(choices: Mapping[str, Any]) -> Reader:
    """Reads the names in ``choices``."""

    def read(text: str) -> Any:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return choices[text]

    return read
