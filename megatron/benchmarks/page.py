"""Make the performance page from the JSON files of the benchmarks.

    python -m megatron.benchmarks.page [--results docs/performance] [--output docs/performance.md]

Every ${name} of ``page_template.md`` becomes the tables of name.json, with the device, the versions
and the date; or, where there is no such file, a row that says so.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template

from megatron.atomic import atomic_write
from megatron.benchmarks.result import Result, read_result
from megatron.cli import run_tool
from megatron.errors import DataError
from megatron.report.tables import Table, table_lines

TEMPLATE = Path(__file__).with_name("page_template.md")
DOCS = Path(__file__).parents[2] / "docs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    parser = argparse.ArgumentParser(description="Make the performance page.")
    parser.add_argument("--results", type=Path, default=DOCS / "performance", metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=DOCS / "performance.md", metavar="FILE")
    args = parser.parse_args(argv)
    page = make_page(args.results)
    with atomic_write(args.output) as file:
        file.write(page.encode())
    print(f"wrote {args.output}")
    return 0


def make_page(results: Path) -> str:
    """The page with all results of a folder.

    Raises:
        DataError: for a file that is no result, or that the page has no place for.
    """
    template = Template(TEMPLATE.read_text())
    names = template.get_identifiers()
    for path in sorted(results.glob("*.json")):
        if path.stem not in names:
            raise DataError(f"{path}: the page has no place for it, only for {', '.join(names)}")
    return template.substitute({name: "\n".join(_section(results, name)) for name in names})


def _section(results: Path, name: str) -> Iterator[str]:
    path = results / f"{name}.json"
    if path.exists():
        yield from _result_lines(_read(path))
    else:
        device = "GPU" if name.endswith("_gpu") else "CPU"
        yield from table_lines(Table("", [{"device": device, "result": "not measured"}]))


def _read(path: Path) -> Result:
    try:
        return read_result(path)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is not the result of a benchmark: {error!r}") from error


def _result_lines(result: Result) -> Iterator[str]:
    environment = dict(result.environment)
    device, date = environment.pop("device"), environment.pop("date")
    versions = ", ".join(f"{name} {value}" for name, value in environment.items())
    for table in result.tables:
        yield f"**{table.title}**, {device}, {date}"
        yield ""
        yield from table_lines(table)
        yield ""
    yield f"<sub>{versions}</sub>"


if __name__ == "__main__":
    run_tool(main)
