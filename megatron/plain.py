"""Files, YAML and JSON as plain data: what is read is text, numbers, lists and mappings.

Nothing in it is looked up, imported or called, whatever it names. What only a hostile file has is
refused while it is small: nesting that no stack holds, and aliases that a few lines of YAML expand
to gigabytes. So is what two readers would understand differently: a key that is there twice, and
numbers that JSON has no sign for.
"""

import json
import math
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MOST_BYTES = 1 << 20
MOST_VALUES = 20_000
MOST_DEPTH = 32
MOST_INT = 2**63

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
# What YAML knows and JSON does not.
_NOT_PLAIN = tuple(f"{_TAG}{name}" for name in ("binary", "timestamp", "omap", "pairs", "set"))


class PlainDataError(ValueError):
    """What was read is not plain data; the message says why, and where."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without dates and "=", and with 1e-4 as the number that people mean."""

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0] not in (f"{_TAG}timestamp", f"{_TAG}value")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = 0
        self._depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """A value of the document; a document of too many ends here."""
        self._count += 1
        self._depth += 1
        _check_size(self._count, self._depth - 1, "")
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Loader.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def open_file(path: Path) -> BinaryIO:
    """A regular file, open for reading. Never waits, as opening a pipe would.

    Raises:
        OSError: if it cannot be opened.
        PlainDataError: if it is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise PlainDataError("is not a regular file")


def read_file(path: Path, most: int | None = None) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: if it cannot be read.
        PlainDataError: if it is no regular file, or has more than ``most`` bytes.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise PlainDataError(f"has {size} bytes, and must not have more than {most}")
        return file.read()


def leads_out(path: Path, folder: Path) -> Path | None:
    """Where ``path`` in ``folder`` leads to if that is outside of it, through links; else None.

    The folder itself may be reached through a link: its name was given, its content was not.
    """
    try:
        place, inside = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):
        # Links in a circle lead nowhere.
        return path
    return None if place.is_relative_to(inside) else place


def parse_yaml(text: str) -> Any:
    """The value that ``text`` is in YAML.

    Raises:
        PlainDataError: if it is no YAML, or more than plain data.
    """
    if len(text) > MOST_BYTES:
        raise PlainDataError(f"has more than {MOST_BYTES} letters")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node, {})
        value = loader.construct_document(node)
    except PlainDataError:
        raise
    except RecursionError as error:
        raise PlainDataError(f"is nested more than {MOST_DEPTH} deep") from error
    except (yaml.YAMLError, LookupError, ValueError) as error:
        raise PlainDataError(_reason(error)) from error
    check_plain(value)
    return value


def parse_json(text: str | bytes) -> Any:
    """The value that ``text`` is in JSON.

    Raises:
        PlainDataError: if it is no JSON, or has a key twice, or a number that is none.
    """
    try:
        value = json.loads(text, object_pairs_hook=_mapping, parse_constant=_refuse)
    except PlainDataError:
        raise
    except RecursionError as error:
        raise PlainDataError("is nested too deeply") from error
    except ValueError as error:
        raise PlainDataError(_reason(error)) from error
    return value


def _reason(error: Exception) -> str:
    if "integer string conversion" in str(error):
        return "has a whole number of too many digits"
    return (
        f"has a value that its tag does not allow: {error}"
        if isinstance(error, LookupError)
        else str(error)
    )


def check_plain(value: Any, depth: int = 0) -> None:
    """Refuse what JSON cannot hold: other objects, numbers and text that it has no sign for.

    Raises:
        PlainDataError: naming what it is.
    """
    if depth > MOST_DEPTH:
        raise PlainDataError(f"is nested more than {MOST_DEPTH} deep")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise PlainDataError(f"has the key {key!r:.60}, which is not text")
            check_plain(key, depth + 1)
            check_plain(inner, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_plain(inner, depth + 1)
    elif isinstance(value, str):
        check_text(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise PlainDataError(f"has the number {value}, which is not finite")
    elif isinstance(value, int) and abs(value) >= MOST_INT:
        raise PlainDataError("has a whole number of more than 63 bits")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise PlainDataError(f"has {value!r:.60}, which is no text and no number")


def check_text(text: str) -> str:
    """Return ``text`` if a file can hold it, and a path.

    Raises:
        PlainDataError: if it cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PlainDataError(f"has {text!r:.60}, which is not Unicode text") from error
    if "\0" in text:
        raise PlainDataError(f"has {text!r:.60} with a zero byte")
    return text


def _check_node(node: Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values ``node`` is with all aliases expanded, and how deep.

    Args:
        known: the answers for the nodes seen so far; None for those that are under way.
    """
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise PlainDataError(f"contains itself{_place(node)}")
        return found
    if node.tag in _NOT_PLAIN:
        raise PlainDataError(f"has a tag that is not plain data, {node.tag}{_place(node)}")
    if isinstance(node, ScalarNode):
        return 1, 0
    known[id(node)] = None
    if isinstance(node, MappingNode):
        _check_keys(node)
    parts = [_check_node(inner, known) for inner in _children(node)]
    size = 1 + sum(size for size, _ in parts)
    depth = 1 + max((depth for _, depth in parts), default=0)
    _check_size(size, depth, _place(node))
    known[id(node)] = size, depth
    return size, depth


def _check_size(values: int, depth: int, place: str) -> None:
    if values > MOST_VALUES:
        raise PlainDataError(f"has more than {MOST_VALUES} values{place}")
    if depth > MOST_DEPTH:
        raise PlainDataError(f"is nested more than {MOST_DEPTH} deep{place}")


def _children(node: Node) -> Sequence[Node]:
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []


def _check_keys(node: MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if key.tag == _MERGE:
            continue
        if not isinstance(key, ScalarNode) or key.tag != f"{_TAG}str":
            shown = key.value if isinstance(key, ScalarNode) else "a list or a mapping"
            raise PlainDataError(f"has the key {shown:.60}, which is not text{_place(key)}")
        if key.value in seen:
            raise PlainDataError(f"has the key {key.value:.60} twice{_place(key)}")
        seen.add(key.value)


def _place(node: Node) -> str:
    return f" (line {node.start_mark.line + 1})"


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise PlainDataError(f"has the key {twice!r:.60} twice")
    return found


def _refuse(constant: str) -> Any:
    raise PlainDataError(f"has {constant}, which is no number of JSON")
