"""What a benchmark found, as a table on the screen and as JSON for the page.

A file holds one result:

    {"benchmark": "head", "environment": {"device": ..., "date": ...},
     "tables": [{"title": ..., "rows": [{"contender": "plain", "peak GiB": 3.1}, ...]}]}

Rows are dictionaries of column name to value; a table has the columns of its first row.
"""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias

import torch

from megatron.atomic import atomic_write, make_folder
from tools.benchmarks.ranks import Device

Cell: TypeAlias = str | int | float | None
Row: TypeAlias = Mapping[str, Cell]

GIB = 2**30
MIB = 2**20

_PACKAGES = ("torch", "transformers", "triton")


@dataclass(frozen=True)
class Table:
    """Rows of the same columns."""

    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Result:
    """What one benchmark found on one device."""

    benchmark: str
    environment: Mapping[str, str]
    tables: Sequence[Table]


def describe_environment(device: Device, threads: str = "1") -> dict[str, str]:
    """What a measurement depends on besides the program.

    Args:
        threads: of each process.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_model()
    packages = {package: _version(package) for package in _PACKAGES}
    return {
        "device": name,
        "threads": threads,
        "python": platform.python_version(),
        **packages,
        "date": datetime.now(UTC).date().isoformat(),
    }


def publish(result: Result, path: Path | None) -> None:
    """Print ``result``, and write it to ``path`` if there is one."""
    for table in result.tables:
        print(f"\n{table.title}\n")
        print("\n".join(table_lines(table)))
    if path is not None:
        make_folder(path.parent)
        with atomic_write(path) as file:
            file.write(f"{json.dumps(asdict(result), indent=2)}\n".encode())


def read_result(path: Path) -> Result:
    """The result that ``publish`` wrote to ``path``."""
    values = json.loads(path.read_text())
    tables = [Table(table["title"], table["rows"]) for table in values["tables"]]
    return Result(values["benchmark"], values["environment"], tables)


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


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        # That of torch's files does not tell for which device they were built.
        return torch.__version__ if package == "torch" else version(package)
    except PackageNotFoundError:
        return "not installed"
