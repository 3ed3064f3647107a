"""What a benchmark found, as a table on the screen and as JSON for the page.

A file holds one result:

    {"benchmark": "head", "environment": {"device": ..., "date": ...},
     "tables": [{"title": ..., "rows": [{"contender": "plain", "peak GiB": 3.1}, ...]}]}

Rows are dictionaries of column name to value; a table has the columns of its first row.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from megatron.atomic import atomic_write, make_folder
from megatron.benchmarks.ranks import Device
from megatron.report.tables import Table, table_lines

GIB = 2**30
MIB = 2**20

_PACKAGES = ("torch", "transformers", "triton")


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
