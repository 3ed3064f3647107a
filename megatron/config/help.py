"""What ``--help`` says of a config: its options, in sections, with the words beside the fields."""

import ast
import inspect
import textwrap
from argparse import ArgumentParser, HelpFormatter
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron.config.named import config_names
from megatron.errors import ConfigError
from megatron.nearest import meant

ALL = "all"
"""The topic that has every option."""


@dataclass(frozen=True)
class Guide:
    """What the help of a program says besides the options of its config.

    Attributes:
        prog: the program, as it is called.
        description: what it does.
        examples: commands that show how.
        most_used: options to show first; without any, all are shown at once.
        own: options that the program takes by itself, and the words for them.
    """

    prog: str
    description: str
    examples: tuple[str, ...] = ()
    most_used: tuple[str, ...] = ()
    own: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Option:
    """One option of a config, in words.

    Attributes:
        name: with its sections, as ``train.rampup.start``.
        words: what it means; empty if nobody has said.
        default: as a YAML file has it; None if the option is required.
        values: what it may be, where these are few: ``{true,false}``.
    """

    name: str
    type: str
    words: str
    default: str | None
    values: str

    @property
    def about(self) -> str:
        """Type and default."""
        if self.default is None:
            return f"required, type: {self.type}"
        return f"type: {self.type}, default: {self.default}"


@dataclass(frozen=True)
class Section:
    """The options of one dataclass of a config.

    Attributes:
        name: as options begin; empty for the root.
        title: what the dataclass says of itself, in a line.
        options: without those of sections inside.
    """

    name: str
    title: str
    options: tuple[Option, ...]


def sections(config: type, name: str = "") -> Iterator[Section]:
    """The sections of a config, each before those inside it."""
    hints, words = get_type_hints(config), _field_words(config)
    prefix = f"{name}." if name else ""
    options, inside = [], []
    for one in fields(config):
        hint = hints[one.name]
        if isinstance(hint, type) and is_dataclass(hint):
            inside.append((hint, f"{prefix}{one.name}"))
            continue
        options.append(
            Option(
                name=f"{prefix}{one.name}",
                type=_type_name(hint),
                words=words.get(one.name, ""),
                default=_default(one),
                values=_values(hint),
            )
        )
    title = (config.__doc__ or "").partition("\n")[0].rstrip(".")
    yield Section(name, title, tuple(options))
    for hint, inner in inside:
        yield from sections(hint, inner)


def help_text(config: type, guide: Guide, topic: str | None) -> str:
    """What ``--help`` prints, or ``--help TOPIC``.

    Args:
        topic: the name of a section, ``all``, or None for what to begin with.

    Raises:
        ConfigError: if there is no such topic.
    """
    found = list(sections(config))
    topics = list(dict.fromkeys(it.name.partition(".")[0] for it in found if it.name))
    if topic is not None and topic not in (ALL, *topics, *(it.name for it in found)):
        hint = meant(topic, topics) or f"; there are {', '.join([*topics, ALL])}"
        raise ConfigError(f"--help {topic:.200}: is not a section{hint}", on_every_rank=True)
    if topic is None and guide.most_used:
        return _first_help(found, topics, guide)
    parser = _parser(guide)
    for section in found:
        if topic in (None, ALL) or f"{section.name}.".startswith(f"{topic}."):
            _add(parser, section.title, section.options)
    if topic in (None, ALL):
        _add_own(parser, guide)
    return parser.format_help()


def _first_help(found: list[Section], topics: list[str], guide: Guide) -> str:
    """Required and most used options, an example, and where there is more."""
    parser = _parser(guide)
    options = {option.name: option for section in found for option in section.options}
    required = [option for option in options.values() if option.default is None]
    _add(parser, "Required, here or in the file of --config", required)
    _add(parser, "Most used", [options[name] for name in guide.most_used])
    _add_own(parser, guide)
    examples = "\n".join(f"  {example}" for example in guide.examples)
    more = textwrap.fill(f"--help SECTION has the others: {', '.join(topics)}.", 80)
    return (
        f"{parser.format_help()}\nexamples:\n{examples}\n\n{more}\n"
        "--help all has every option. In their names - and _ are the same.\n"
    )


def _parser(guide: Guide) -> ArgumentParser:
    """A parser that is there for its help only."""
    return ArgumentParser(
        prog=guide.prog,
        usage=f"{guide.prog} [--config FILE] [--section.option VALUE ...]",
        description=guide.description,
        add_help=False,
        allow_abbrev=False,
        # Not as wide as what calls it happens to be, so that it is the same everywhere.
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=28, width=100),
    )


def _add(parser: ArgumentParser, title: str, options: "list[Option] | tuple[Option, ...]") -> None:
    group = parser.add_argument_group(title)
    for option in options:
        text = f"{option.words} ({option.about})".strip()
        metavar = option.values or option.name.rpartition(".")[2].upper()
        group.add_argument(f"--{option.name}", metavar=metavar, help=text.replace("%", "%%"))


def _add_own(parser: ArgumentParser, guide: Guide) -> None:
    group = parser.add_argument_group("What to read, and what to do instead of training")
    names = ", ".join(config_names())
    own = {
        "config FILE": "YAML file with any of the options, or the name of one that comes with "
        f"bloom: {names}; may be repeated, the later winning",
        "print_config": "print the whole configuration as YAML that --config reads, and exit",
        **guide.own,
        "help [SECTION]": "print this, the options of a section, or with all every option",
    }
    for name, words in own.items():
        option, _, metavar = name.partition(" ")
        takes: dict[str, Any] = {"metavar": metavar} if metavar else {"action": "store_true"}
        group.add_argument(f"--{option}", help=words.replace("%", "%%"), **takes)


def _field_words(config: type) -> dict[str, str]:
    """The text that stands below each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[statement.target.id] = " ".join(str(text.value.value).split())
    return found


def _default(one: "Field[Any]") -> str | None:
    if one.default is not MISSING:
        return _yaml(one.default)
    return _yaml(one.default_factory()) if one.default_factory is not MISSING else None


def _yaml(value: Any) -> str:
    """A default as a YAML file has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return str(list(value))
    return str(value)


def _values(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    return "{true,false}" if hint is bool else ""


_TYPES = {bool: "true or false", int: "whole number", float: "number", Path: "path", str: "text"}


def _type_name(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        return " or ".join(map(_type_name, parts))
    if origin is Literal:
        return ", ".join(map(str, parts)) if len(parts) > 1 else str(parts[0])
    if hint is NoneType:
        return "null"
    if origin is dict:
        return "mapping of names to " + ("values" if parts[1] is Any else "numbers")
    if origin is tuple:
        return f"list of {len(parts)} numbers"
    return _TYPES[hint]
