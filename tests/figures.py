"""Figures that tests measure, listed once more at the end of a run.

A test takes the fixture ``figure`` and calls it with a name and what it measured:

    figure("head memory", plain_mib=2940.0, fused_mib=310.5)

The summary then has the line ``head memory  plain_mib=2940 fused_mib=310.5``. Figures travel as
user properties of the reports, which pytest-xdist brings home from its workers.
"""

from collections.abc import Callable, Iterable
from typing import TypeAlias

PROPERTY = "figure"

Record: TypeAlias = Callable[[str, object], None]
Figure: TypeAlias = Callable[..., None]


def recorder(record: Record) -> Figure:
    """The ``figure`` of one test, on its ``record_property``."""

    def figure(name: str, **values: float | str) -> None:
        record(PROPERTY, _line(name, values))

    return figure


def recorded(properties: Iterable[tuple[str, object]]) -> list[str]:
    """The lines of one report's user properties."""
    return [str(value) for name, value in properties if name == PROPERTY]


def _line(name: str, values: dict[str, float | str]) -> str:
    texts = (
        f"{key}={value if isinstance(value, str) else format(value, '.4g')}"
        for key, value in values.items()
    )
    return f"{name}  {' '.join(texts)}"
