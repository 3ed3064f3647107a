"""From a command line to a config dataclass, with errors that a newcomer can read.

Values come from YAML files and from ``--section.key``, as plain data: see ``megatron/plain.py``. A
library that makes objects of them would be shorter; those there are take a value that names a class
for a class to import and call. What is wrong is told in the words of the dataclass, by its option
names and types:

    an unknown name     optimizer.lrr is not an option; did you mean optimizer.lr?
    a wrong value       optimizer.lr must be a number, got 'abc'
    a wrong file        --config run.yaml: cannot be read: No such file or directory
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from megatron.config.help import Guide, help_text
from megatron.config.named import about_names, config_path
from megatron.config.values import (
    ValueMismatchError,
    convert,
    expected,
    from_text,
    parse_text,
)
from megatron.errors import ConfigError
from megatron.nearest import meant
from megatron.plain import MOST_BYTES, PlainDataError, check_plain, parse_yaml, read_file

T = TypeVar("T")

_OWN_OPTIONS = ("config", "help", "print_config")
_SHORT = {"-h": "--help"}
_HELP = (*_SHORT, "--help")


@dataclass(frozen=True)
class _Given:
    """One word of a command line: ``--name value``, or ``--name`` alone."""

    name: str
    value: str | None


def parse_config(config: type[T], argv: Sequence[str], guide: Guide) -> T:
    """Make a ``config`` of ``--config FILE`` and ``--section.key value``, the later winning.

    ``--help``, ``--help SECTION`` and ``--print_config`` print and raise SystemExit(0). In names
    of options ``-`` is taken for ``_``.

    Args:
        config: a dataclass, whose fields may be dataclasses, and so on.
        guide: what the help says besides the options.

    Raises:
        ConfigError: naming the option, its value and the rule that it breaks.
    """
    options = _option_types(config)
    given = list(_read_words(argv, options))
    for it in given:
        if it.name == "help":
            sys.stdout.write(help_text(config, guide, it.value))
            raise SystemExit(0)
    values: dict[str, Any] = {}
    for it in given:
        if it.name == "config":
            values |= _read_config(str(it.value), options)
        elif it.name != "print_config":
            _set_option(it.name, str(it.value), options, values)
    if any(it.name == "print_config" for it in given):
        sys.stdout.write(yaml.safe_dump(_shown(config, values), sort_keys=False))
        raise SystemExit(0)
    return _build(config, values)


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether a command line only wants to be told what there is."""
    return any(word.partition("=")[0] in _HELP for word in argv)


def config_from_values(config: type[T], values: Mapping[str, Any]) -> T:
    """Make a ``config`` of nested values, as a YAML file or a checkpoint holds them.

    Raises:
        ConfigError: naming the option, its value and the rule that it breaks.
    """
    try:
        check_plain(values)
    except PlainDataError as error:
        raise _error(f"the config {error}") from error
    return _build(config, _take_values(values, _option_types(config), place=""))


def _option_types(config: type, prefix: str = "") -> dict[str, Any]:
    """The type of every option, by its dotted name."""
    types: dict[str, Any] = {}
    hints = get_type_hints(config)
    for field in fields(config):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        types |= _option_types(hint, f"{name}.") if _is_config(hint) else {name: hint}
    return types


def _is_config(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


def _read_words(argv: Sequence[str], options: Mapping[str, Any]) -> Iterator[_Given]:
    """What the command line gives, in order, once all its names are known to be options."""
    words = list(argv)
    for word in words:
        if word.startswith("--"):
            _check_name(_spelled(word[2:].partition("=")[0], options), options)
    while words:
        word = words.pop(0)
        word = _SHORT.get(word, word)
        if not word.startswith("--"):
            raise _error(f"unrecognized arguments: {word}")
        name, has_value, value = word[2:].partition("=")
        name = _spelled(name, options)
        if name == "help":
            if not has_value and words and not words[0].startswith("-"):
                value = words.pop(0)
            yield _Given(name, value or None)
            continue
        if name == "print_config":
            if has_value:
                raise _error(f"argument --{name}: takes no value, got '{value}'")
            yield _Given(name, None)
            continue
        if not has_value:
            if not words or words[0].startswith("--"):
                raise _error(f"argument --{name}: expected one argument")
            value = words.pop(0)
        yield _Given(name, value)


def _spelled(name: str, options: Mapping[str, Any]) -> str:
    """The name of an option as it is declared, if it differs in ``-`` for ``_`` only."""
    declared = name.replace("-", "_")
    return declared if declared in (*options, *_OWN_OPTIONS) else name


def _read_config(given: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The values in a file, or in a config of the package, by dotted names."""
    place = f"--config {given}: "
    try:
        values = parse_yaml(read_file(config_path(given), MOST_BYTES).decode())
    except OSError as error:
        raise _error(f"{place}cannot be read: {error.strerror}{about_names(given)}") from error
    except (PlainDataError, UnicodeDecodeError) as error:
        raise _error(f"{place}is not YAML: {_one_line(str(error))}") from error
    except ValueError as error:
        raise _error(f"{place}cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise _error(f"{place}must be a mapping of options to values, got {values!r:.60}")
    return _take_values(values, options, place)


def _take_values(
    values: Mapping[str, Any], options: Mapping[str, Any], place: str
) -> dict[str, Any]:
    """Nested values as those of options, by dotted names."""
    given: dict[str, Any] = {}
    for name, value in _flat(values, options, place):
        _check_name(name, options, place)
        if name not in options:
            raise _error(f"{place}{name} is not an option of a file")
        if name in given:
            raise _error(f"{place}{name} is given twice")
        given[name] = _convert(name, value, options, place)
    return given


def _flat(
    values: Mapping[str, Any], options: Mapping[str, Any], place: str, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """The values in a file, by dotted names."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if not _is_section(name, options):
            yield name, value
        elif isinstance(value, dict):
            yield from _flat(value, options, place, f"{name}.")
        else:
            raise _error(f"{place}{name} must be a section of options, got {value!r:.60}")


def _convert(name: str, value: Any, options: Mapping[str, Any], place: str) -> Any:
    try:
        return convert(options[name], value)
    except ValueMismatchError as error:
        raise _wrong_value(name, options, str(error), place) from error


def _set_option(name: str, text: str, options: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Take ``--name text``: an option, or one name of an option that is a mapping."""
    option = name if name in options else _mapping_of(name, options)
    assert option is not None, "all names have been checked"
    try:
        if option == name:
            values[name] = from_text(options[name], text)
            return
        inside = name[len(option) + 1 :]
        # What DeepSpeed's options are called has dots between the sections; a path has them too.
        is_open = get_args(options[option])[1] is Any
        keys = inside.split(".") if is_open else [inside]
        whole = _with_inner(values.get(option, {}), keys, parse_text(text))
        values[option] = convert(options[option], whole)
    except ValueMismatchError as error:
        raise _wrong_value(option, options, str(error)) from error


def _with_inner(mapping: Any, keys: Sequence[str], value: Any) -> dict[str, Any]:
    """``mapping`` with another value at the end of ``keys``."""
    inner = dict(mapping) if isinstance(mapping, dict) else {}
    first, *rest = keys
    inner[first] = _with_inner(inner.get(first), rest, value) if rest else value
    return inner


def _wrong_value(name: str, options: Mapping[str, Any], text: str, place: str = "") -> ConfigError:
    shown = _one_line(text)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    return _error(f"{place}{name} must be {expected(options[name])}, got '{shown}'")


def _build(config: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass with the values of options, by dotted names."""
    missing = [name for name in _required(config) if name not in values]
    if missing:
        raise _error(f"the following arguments are required: {', '.join(missing)}")
    return _build_section(config, values, "")


def _build_section(config: type[T], values: Mapping[str, Any], prefix: str) -> T:
    hints, parts = get_type_hints(config), {}
    for field in fields(config):  # type: ignore[arg-type]
        name = f"{prefix}{field.name}"
        if name in values:
            parts[field.name] = values[name]
        elif any(option.startswith(f"{name}.") for option in values):
            parts[field.name] = _build_section(hints[field.name], values, f"{name}.")
    return config(**parts)


def _required(config: type, prefix: str = "") -> Iterator[str]:
    """The options without a default, those of sections without one included."""
    hints = get_type_hints(config)
    for field in fields(config):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if _is_config(hint):
            yield from _required(hint, f"{name}.")
        elif field.default is MISSING and field.default_factory is MISSING:
            yield name


def _shown(config: type, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """All options as YAML can hold them; null where one is required and not given."""
    hints, shown = get_type_hints(config), {}
    for field in fields(config):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if _is_config(hint):
            shown[field.name] = _shown(hint, values, f"{name}.")
            continue
        value = None if field.default is MISSING else field.default
        if field.default_factory is not MISSING:
            value = field.default_factory()
        shown[field.name] = _plain(values.get(name, value))
    return shown


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _check_name(name: str, options: Mapping[str, Any], place: str = "") -> None:
    if name in (*options, *_OWN_OPTIONS) or _mapping_of(name, options) is not None:
        return
    if _is_section(name, options):
        inside = next(option for option in options if option.startswith(f"{name}."))
        raise _error(f"{place}{name} is a section, not an option; give its options, as {inside}")
    sections = {option.rpartition(".")[0] for option in options} - {""}
    hint = meant(name, [*options, *sorted(sections)]) or "; --help all has those that there are"
    raise _error(f"{place}{name:.200} is not an option{hint}")


def _mapping_of(name: str, options: Mapping[str, Any]) -> str | None:
    """The option, a mapping, that ``name`` is a name in."""
    mappings = (option for option, hint in options.items() if get_origin(hint) is dict)
    return next((option for option in mappings if name.startswith(f"{option}.")), None)


def _is_section(name: str, options: Mapping[str, Any]) -> bool:
    return any(option.startswith(f"{name}.") for option in options)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _error(message: str) -> ConfigError:
    return ConfigError(message, on_every_rank=True)
