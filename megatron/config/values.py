"""From plain data to the values of a config: each option takes what its type says, or refuses it.

The types are those that a config has: true or false, numbers, words out of a list, paths, and lists
and mappings of them. ``Any`` is plain data, which is handed on as it is; that it names something is
of no meaning here.
"""

import math
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from megatron.plain import MOST_INT, PlainDataError, check_plain, check_text, parse_json, parse_yaml

_WORDS: dict[Any, str] = {
    NoneType: "null",
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    Path: "a path",
    Any: "plain data",
}
_NULL = ("null", "~", "")


class ValueMismatchError(ValueError):
    """The value is none of the type."""


def convert(hint: Any, value: Any) -> Any:
    """Plain data as a value of the type ``hint``.

    Raises:
        ValueMismatchError: if it is none.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        return _first_that_fits(parts, value)
    if origin is Literal:
        # True equals 1, and is another word.
        found = [part for part in parts if part == value and type(part) is type(value)]
        return found[0] if found else _refuse(value)
    if origin is dict:
        return _mapping(parts[1], value)
    if origin is tuple:
        fits = isinstance(value, list | tuple) and len(value) == len(parts)
        return tuple(map(convert, parts, value)) if fits else _refuse(value)
    return _single(hint, value)


def from_text(hint: Any, text: str) -> Any:
    """A word of the command line as a value of the type ``hint``.

    Raises:
        ValueMismatchError: if it is none.
    """
    choices = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    if text in _NULL and NoneType in choices:
        return None
    literals = [get_args(choice) for choice in choices if get_origin(choice) is Literal]
    if any(text in words for words in literals):
        return text
    if Path in choices:
        return convert(Path, text)
    return convert(hint, parse_text(text))


def parse_text(text: str) -> Any:
    """A word of the command line as plain data: JSON, or else YAML.

    Raises:
        ValueMismatchError: if it is neither.
    """
    try:
        value = parse_json(text)
        check_plain(value)
    except PlainDataError:
        return _parse_yaml(text)
    return value


def _parse_yaml(text: str) -> Any:
    try:
        return parse_yaml(text)
    except PlainDataError as error:
        raise ValueMismatchError(f"{text:.60}, which {error}") from error


def expected(hint: Any) -> str:
    """What a value of the type ``hint`` is, for people."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"{'one of ' if len(parts) > 1 else ''}{', '.join(map(str, parts))}"
    if origin in (UnionType, Union):
        return " or ".join(map(expected, parts))
    if origin is dict:
        return f"a mapping of names to {'values' if parts[1] is Any else 'numbers'}"
    if origin is tuple:
        return f"a list of {len(parts)} numbers"
    return _WORDS[hint]


def _first_that_fits(hints: tuple[Any, ...], value: Any) -> Any:
    for hint in hints:
        try:
            return convert(hint, value)
        except ValueMismatchError:
            continue
    return _refuse(value)


def _mapping(hint: Any, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        _refuse(value)
    return {convert(str, key): convert(hint, inner) for key, inner in value.items()}


def _single(hint: Any, value: Any) -> Any:
    if hint is Any:
        try:
            check_plain(value)
        except PlainDataError as error:
            raise ValueMismatchError(str(error)) from error
        return value
    # A bool is an int to isinstance.
    kind = type(value)
    if hint is float and kind in (int, float):
        return _number(value)
    if hint is int and kind is int and abs(value) < MOST_INT:
        return value
    if hint is Path and kind is str and value:
        return Path(_text(value))
    if hint is str and kind is str:
        return _text(value)
    if hint in (bool, NoneType) and kind is hint:
        return value
    return _refuse(value)


def _number(value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        return _refuse(value)
    return number if math.isfinite(number) else _refuse(value)


def _text(value: str) -> str:
    try:
        return check_text(value)
    except PlainDataError as error:
        raise ValueMismatchError(str(error)) from error


def _refuse(value: Any) -> Any:
    huge = isinstance(value, int) and abs(value) >= MOST_INT
    raise ValueMismatchError("more than 63 bits" if huge else str(value))
