"""From a command line to a config dataclass, with errors that a newcomer can read.

jsonargparse finds the values, in YAML files and after ``--section.key``. What is wrong with them is
told in the words of the dataclass, by its option names and types:

    an unknown name     optimizer.lrr is not an option; did you mean optimizer.lr?
    a wrong value       optimizer.lr must be a number, got 'abc'
    a wrong file        --config run.yaml: cannot be read: No such file or directory
"""

import re
from argparse import ArgumentParser as PlainParser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from megatron.errors import ConfigError

T = TypeVar("T")

_OWN_OPTIONS = ("config", "help", "print_config")
_WORDS: dict[Any, str] = {
    NoneType: "null",
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    Path: "a path",
}
_WRONG_VALUE = re.compile(r'Parser key "([^"]+)":.*?(?:Got|Given) value: (.*)', re.DOTALL)


def parse_config(config: type[T], argv: Sequence[str], *, prog: str, description: str) -> T:
    """Make a ``config`` of ``--config FILE`` and ``--section.key value``, the later winning.

    ``--help`` and ``--print_config`` print and raise SystemExit(0).

    Args:
        config: a dataclass, whose fields may be dataclasses, and so on.
        prog: what the help calls the program.
        description: what the help says of it.

    Raises:
        ConfigError: naming the option, its value and the rule that it breaks.
    """
    options = _option_types(config)
    parser = _build_parser(config, prog, description)
    try:
        for name in _names(argv):
            _check_name(name, options)
        for path in _config_files(argv):
            _check_file(path, options)
        return _instantiate(config, parser, parser.parse_args(list(argv)))
    except ConfigError:
        raise
    except (ArgumentError, ValueError) as error:
        raise _error(_in_words(str(error), options)) from error


def config_from_values(config: type[T], values: Mapping[str, Any]) -> T:
    """Make a ``config`` of nested values, as a YAML file or a checkpoint holds them.

    Raises:
        ConfigError: naming the option, its value and the rule that it breaks.
    """
    options = _option_types(config)
    parser = _build_parser(config, prog="config", description="")
    try:
        for name in _names_in(values, options, place=""):
            _check_name(name, options)
        return _instantiate(config, parser, parser.parse_object(dict(values)))
    except ConfigError:
        raise
    except (ArgumentError, ValueError) as error:
        raise _error(_in_words(str(error), options)) from error


def _instantiate(config: type[T], parser: ArgumentParser, namespace: Namespace) -> T:
    values = parser.instantiate(namespace)
    return config(**{name: values[name] for name in get_type_hints(config)})


def _build_parser(config: type, prog: str, description: str) -> ArgumentParser:
    set_parsing_settings(
        config_read_mode_urls_enabled=False, docstring_parse_attribute_docstrings=True
    )
    parser = ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(config, nested_key=None)
    return parser


def _option_types(config: type, prefix: str = "") -> dict[str, Any]:
    """The type of every option, by its dotted name."""
    types: dict[str, Any] = {}
    hints = get_type_hints(config)
    for field in fields(config):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        section = isinstance(hint, type) and is_dataclass(hint)
        types |= _option_types(hint, f"{name}.") if section else {name: hint}
    return types


def _names(argv: Sequence[str]) -> Iterator[str]:
    """The dotted names that are given on the command line."""
    return (arg[2:].partition("=")[0] for arg in argv if arg.startswith("--"))


def _config_files(argv: Sequence[str]) -> list[str]:
    parser = PlainParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    files: list[str] = parser.parse_known_args(argv)[0].config
    return files


def _check_file(path: str, options: Mapping[str, Any]) -> None:
    """Refuse a file that is no YAML, or has names that are no options."""
    place = f"--config {path}: "
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise _error(f"{place}cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _error(f"{place}is not YAML: {_one_line(str(error))}") from error
    if not isinstance(values, dict):
        raise _error(f"{place}must be a mapping of options to values, got {values!r:.60}")
    for name in _names_in(values, options, place):
        _check_name(name, options, place)


def _names_in(
    values: Mapping[Any, Any], options: Mapping[str, Any], place: str, prefix: str = ""
) -> Iterator[str]:
    """The dotted names of the values in a file."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if not _is_section(name, options):
            yield name
        elif isinstance(value, dict):
            yield from _names_in(value, options, place, f"{name}.")
        else:
            raise _error(f"{place}{name} must be a section of options, got {value!r:.60}")


def _check_name(name: str, options: Mapping[str, Any], place: str = "") -> None:
    mappings = (option for option, hint in options.items() if get_origin(hint) is dict)
    if name in (*options, *_OWN_OPTIONS) or any(name.startswith(f"{m}.") for m in mappings):
        return
    if _is_section(name, options):
        inside = next(option for option in options if option.startswith(f"{name}."))
        raise _error(f"{place}{name} is a section, not an option; give its options, as {inside}")
    sections = {option.rpartition(".")[0] for option in options} - {""}
    nearest = max([*options, *sorted(sections)], key=lambda option: _likeness(name, option))
    raise _error(f"{place}{name} is not an option; did you mean {nearest}?")


def _is_section(name: str, options: Mapping[str, Any]) -> bool:
    return any(option.startswith(f"{name}.") for option in options)


def _likeness(name: str, option: str) -> float:
    """How much the names are alike, as a whole and without their sections: 0 to 2."""
    pairs = [(name, option), (name.rpartition(".")[2], option.rpartition(".")[2])]
    return sum(SequenceMatcher(a=a, b=b).ratio() for a, b in pairs)


def _in_words(message: str, options: Mapping[str, Any]) -> str:
    """What jsonargparse says, with the option's type in words if it is about a value."""
    match = _WRONG_VALUE.fullmatch(message)
    if match is None or match[1] not in options:
        return _one_line(message)
    return f"{match[1]} must be {_expected(options[match[1]])}, got '{_one_line(match[2])}'"


def _expected(hint: Any) -> str:
    """What a value of the type ``hint`` is, for people."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"{'one of ' if len(parts) > 1 else ''}{', '.join(map(str, parts))}"
    if origin in (UnionType, Union):
        return " or ".join(map(_expected, parts))
    if origin is dict:
        return f"a mapping of names to {'values' if parts[1] is Any else 'numbers'}"
    if origin is tuple:
        return f"a list of {len(parts)} numbers"
    return _WORDS[origin or hint]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _error(message: str) -> ConfigError:
    return ConfigError(message, on_every_rank=True)
