"""Figures that tests measure, listed once more at the end of a run.

A test takes the fixture ``figure`` and calls it with a name and what it measured:

    figure("head memory", plain_mib=2940.0, fused_mib=310.5)

The summary then has the line ``head memory  plain_mib=2940 fused_mib=310.5``. Of a name that
several tests report, it has the number of tests and the largest of each value. Figures travel as
user properties of the reports, which pytest-xdist brings home from its workers.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

PROPERTY = "figure"

Value: TypeAlias = float | str
Record: TypeAlias = Callable[[str, object], None]
Figure: TypeAlias = Callable[..., None]


def recorder(record: Record) -> Figure:
    """The ``figure`` of one test, on its ``record_property``."""

    def figure(name: str, **values: Value) -> None:
        record(PROPERTY, json.dumps([name, values]))

    return figure


def summary(properties: Iterable[tuple[str, object]]) -> Iterator[str]:
    """The lines for the user properties of all reports."""
    figures: defaultdict[str, list[dict[str, Value]]] = defaultdict(list)
    for kind, text in properties:
        if kind == PROPERTY:
            name, values = json.loads(str(text))
            figures[name].append(values)
    for name in sorted(figures):
        yield _line(name, figures[name])


def _line(name: str, records: list[dict[str, Value]]) -> str:
    values = {key: max(record[key] for record in records) for key in records[0]}
    if len(records) > 1:
        values = {"tests": len(records), **{f"most_{key}": value for key, value in values.items()}}
    texts = (
        f"{key}={value if isinstance(value, str) else format(value, '.4g')}"
        for key, value in values.items()
    )
    return f"{name}  {' '.join(texts)}"
