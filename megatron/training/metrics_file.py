"""``metrics.jsonl`` as a file: its lines, and what a start does with those of earlier starts.

A line is a JSON object whose last field sums up the bytes before it, so that a line that has
changed is told from one that is as it was written:

    {"event": "step", "step": 7, "loss": 3.25, "crc32": "8d3f01aa"}

Lines that were written before there were sums have none, and are believed unless a line before
them has one.

A run that goes on from step n writes the steps after n again. The lines after n, those that are
damaged, and the one that a killed run left unfinished are moved to ``metrics-cut-0001.jsonl`` (0002
and so on), so that every step stands once in ``metrics.jsonl`` and nothing is lost. A fresh start
moves all lines.
"""

import json
import logging
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from megatron.atomic import atomic_writes
from megatron.errors import DiskError

logger = logging.getLogger(__name__)

Record: TypeAlias = dict[str, Any]

EVENTS = ("start", "step", "eval", "save")

_SUMMED = re.compile(rb'(\{.*), "crc32": "([0-9a-f]{8})"\}\n?', re.DOTALL)
_NAMED = 5
"""So many lines or steps are named in a message."""


def encode_record(record: Mapping[str, Any]) -> bytes:
    """The line of ``record``."""
    text = json.dumps(_strict(record), allow_nan=False, default=str).encode("ascii")
    body = text.removesuffix(b"}")
    return b'%s, "crc32": "%08x"}\n' % (body, zlib.crc32(body))


def decode_lines(lines: Iterable[bytes]) -> Iterator[tuple[bytes, Record | None]]:
    """Each of ``lines`` with its record; None for one that is damaged or unfinished."""
    summed = False
    for line in lines:
        match = _SUMMED.fullmatch(line)
        intact = not summed if match is None else zlib.crc32(match[1]) == int(match[2], 16)
        summed |= match is not None
        yield line, _parse(line) if intact and line.endswith(b"\n") else None


def _parse(line: bytes) -> Record | None:
    """The record that ``line`` holds, or None if it holds none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    record.pop("crc32", None)
    return record if record.get("event") in EVENTS else None


def _strict(value: Any) -> Any:
    """``value`` with infinities and NaNs, which JSON lacks, as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


@dataclass(frozen=True)
class Survey:
    """What the metrics ``path`` hold for a run that goes on from ``step``.

    Attributes:
        later: numbers, from 1 on, of the lines that the run will write again, and of an unfinished
            last one.
        damaged: those of the lines that are damaged.
        missing: steps up to ``step`` of which there is no line.
    """

    path: Path
    step: int
    later: frozenset[int]
    damaged: list[int]
    missing: list[int]


def survey(path: Path, step: int) -> Survey:
    """What ``path``, which need not exist, holds for a run that goes on from ``step``.

    Raises:
        DiskError: if it cannot be read.
    """
    later, damaged, seen = [], [], set()
    for number, (line, record) in enumerate(decode_lines(_read_lines(path)), start=1):
        if record is None and line.endswith(b"\n"):
            damaged.append(number)
        elif record is None or not 0 < step >= record["step"]:
            later.append(number)
        elif record["event"] == "step":
            seen.add(record["step"])
    missing = [number for number in range(1, step + 1) if number not in seen]
    return Survey(path, step, frozenset(later), damaged, missing)


def last_save(path: Path) -> int:
    """The last step that the metrics ``path`` tell to be saved; 0 if they tell of none.

    Raises:
        DiskError: if they cannot be read.
    """
    told = (line for line in _read_lines(path) if b'"event": "save"' in line)
    records = (record for _, record in decode_lines(told) if record is not None)
    return max((record["step"] for record in records if record["event"] == "save"), default=0)


def tell_damage(found: Survey) -> None:
    """Warn of what ``found`` misses."""
    if found.damaged:
        lines = f"line{'s' if len(found.damaged) > 1 else ''} {_some(found.damaged)}"
        logger.warning("%s: damaged %s; a start moves them to a file beside it", found.path, lines)
    if found.missing:
        logger.warning(
            "%s: tells nothing of %d of the %d steps: %s",
            found.path,
            len(found.missing),
            found.step,
            _some(found.missing),
        )


def begin_metrics(found: Survey, start: Mapping[str, Any], beside: Mapping[Path, bytes]) -> None:
    """Rewrite the metrics for the run that they were surveyed for, with the record ``start`` at
    their end. What is taken out is kept in a file of its own.

    Args:
        beside: other files that appear with it; none of them does unless all can be written.

    Raises:
        DiskError: if a file cannot be written; nothing has changed then.
    """
    path, moved = found.path, found.later.union(found.damaged)
    cut = numbered(path.parent, "metrics-cut-", ".jsonl")
    with atomic_writes(*([cut] if moved else []), path, *beside) as files:
        for number, line in enumerate(_read_lines(path), start=1):
            files[cut if number in moved else path].write(line)
        files[path].write(encode_record(start))
        for other, content in beside.items():
            files[other].write(content)
    if moved:
        why = "all, at a fresh start" if found.step == 0 else f"those after step {found.step}"
        if found.damaged:
            why += f", and {len(found.damaged)} damaged"
        level = logging.WARNING if found.step == 0 or found.damaged else logging.INFO
        logger.log(level, "%s: moved %d lines to %s: %s", path, len(moved), cut.name, why)


def _read_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        return
    except OSError as error:
        raise DiskError(f"{path}: cannot be read: {error.strerror or error}") from error


def numbered(folder: Path, prefix: str, suffix: str) -> Path:
    """The first name after all of ``folder`` like ``<prefix>0001<suffix>``."""
    names = os.listdir(folder) if folder.is_dir() else []
    pattern = re.compile(rf"{re.escape(prefix)}(\d{{4,}}){re.escape(suffix)}")
    used = [int(match[1]) for name in names if (match := pattern.fullmatch(name))]
    return folder / f"{prefix}{max(used, default=0) + 1:04}{suffix}"


def _some(numbers: list[int]) -> str:
    """The first of ``numbers``, as text."""
    rest = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return ", ".join(map(str, numbers[:_NAMED])) + rest
