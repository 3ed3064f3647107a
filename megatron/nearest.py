"""The name that somebody may have meant who wrote one that does not exist."""

from collections.abc import Collection
from difflib import get_close_matches

_LONGEST = 200
"""Letters of a name that are looked at; comparing takes time that grows with their square."""


def nearest(name: str, names: Collection[str]) -> str | None:
    """The one of ``names`` that is most like ``name``; None if none is like it.

    Of dotted names, such as those of options in sections, the last part may be alike alone.
    """
    name = name[:_LONGEST]
    whole = get_close_matches(name, names, n=1)
    if whole:
        return whole[0]
    last_parts = {other.rpartition(".")[2]: other for other in names}
    last = get_close_matches(name.rpartition(".")[2], last_parts, n=1)
    return last_parts[last[0]] if last else None


def meant(name: str, names: Collection[str]) -> str:
    """``nearest`` as the end of a message: ``; did you mean NAME?``, or nothing."""
    found = nearest(name, names)
    return "" if found is None else f"; did you mean {found}?"
