"""Every place in a structure of mappings and lists, and the structure with something else there."""

import copy
from collections.abc import Iterator
from typing import Any, TypeAlias

Place: TypeAlias = tuple[str | int, ...]

MOST_ALIKE = 3
"""So many entries are walked of a mapping with more than SIMILAR of them, as a vocabulary has."""
SIMILAR = 40


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """The place of every value below ``value``; of a list, its first item only."""
    if isinstance(value, dict):
        keys = list(value)
        for key in keys if len(keys) <= SIMILAR else keys[:MOST_ALIKE]:
            yield (*place, key)
            yield from places(value[key], (*place, key))
    elif isinstance(value, list) and value:
        yield (*place, 0)
        yield from places(value[0], (*place, 0))


def at(value: Any, place: Place) -> Any:
    """What stands at ``place``."""
    for key in place:
        value = value[key]
    return value


def put(value: Any, place: Place, new: Any) -> Any:
    """``value`` with ``new`` at ``place``."""
    whole = copy.deepcopy(value)
    if not place:
        return new
    at(whole, place[:-1])[place[-1]] = new
    return whole


def put_key(value: Any, place: Place, key: str) -> Any:
    """``value`` with another key for what stands at ``place``, in a mapping."""
    whole = copy.deepcopy(value)
    above = at(whole, place[:-1])
    above[key] = above.pop(place[-1])
    return whole
