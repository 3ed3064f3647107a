"""Tables for a terminal and for a page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Cell: TypeAlias = str | int | float | None
Row: TypeAlias = Mapping[str, Cell]


@dataclass(frozen=True)
class Table:
    """Rows of the same columns."""

    title: str
    rows: Sequence[Row]


def table_lines(table: Table) -> Iterator[str]:
    """``table`` in Markdown, in columns of even width."""
    if not table.rows:
        yield "Nothing to measure here."
        return
    columns = list(table.rows[0])
    texts = [columns, *([_text(row.get(column)) for column in columns] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    yield _line(texts[0], widths)
    yield _line(["-" * width for width in widths], widths)
    for row in texts[1:]:
        yield _line(row, widths)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return f"| {' | '.join(padded)} |"


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else cell
