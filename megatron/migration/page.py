"""A migrated config as YAML: what is lost at its head, and beside each option its source."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from megatron.config import config_to_dict
from megatron.migration.translate import Migrated
from megatron.migration.values import Kind, Note, Setting

_HEADINGS: dict[Kind, str] = {
    "lost": "No equal here, and why:",
    "to do": "To do before the run:",
    "different": "Not as in the original:",
    "not needed": "Not needed here:",
}
_WIDTH = 100
_COMMENT_COLUMN = 42


def page(migrated: Migrated, title: str) -> str:
    """The YAML file."""
    lines = [f"# {_printable(title)}", *_notes(migrated), ""]
    settings = dict(migrated.settings.items())
    lines += _options(config_to_dict(migrated.config), settings)
    return "\n".join(lines) + "\n"


def summary(migrated: Migrated) -> str:
    """What a person must know before the run."""
    kinds: tuple[Kind, ...] = ("lost", "to do")
    return "".join(f"{line}\n" for kind in kinds for line in _block(kind, migrated.notes.of(kind)))


def _notes(migrated: Migrated) -> Iterator[str]:
    """All that there is to say, as comments."""
    for kind in _HEADINGS:
        for line in _block(kind, migrated.notes.of(kind)):
            yield f"# {line}".rstrip()


def _block(kind: Kind, notes: list[Note]) -> list[str]:
    """A heading, and an entry for each note."""
    if not notes:
        return []
    lines = ["", _HEADINGS[kind]]
    for note in notes:
        lines += textwrap.wrap(
            _printable(f"{note.name}: {note.text}"),
            _WIDTH - 2,
            initial_indent="  ",
            subsequent_indent="      ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _options(
    values: Mapping[str, Any], settings: Mapping[str, Setting], prefix: str = ""
) -> Iterator[str]:
    """The options that are set, in the order of the config."""
    indent = "  " * prefix.count(".")
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in settings:
            yield from _option(f"{indent}{key}:", settings[name], indent)
        elif any(option.startswith(f"{name}.") for option in settings):
            yield f"{indent}{key}:"
            yield from _options(value, settings, f"{name}.")


def _option(start: str, setting: Setting, indent: str) -> Iterator[str]:
    """The line of an option, or the lines of a mapping."""
    mapping = isinstance(setting.value, Mapping)
    line = start if mapping else f"{start} {_scalar(setting.value)}"
    yield f"{line:<{_COMMENT_COLUMN - 1}} # {_printable(setting.source)}"
    if mapping:
        text = yaml.safe_dump(setting.value, sort_keys=False, width=_WIDTH)
        yield textwrap.indent(text, f"{indent}  ").rstrip()


def _scalar(value: Any) -> str:
    return yaml.safe_dump([value], default_flow_style=True, width=10**6).strip()[1:-1]


def _printable(text: str) -> str:
    """A text as one line of a comment."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
