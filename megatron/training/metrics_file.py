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
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
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
    """What a metrics file holds, seen from the step that a run goes on from.

    Attributes:
        later: lines that the run will write again, and an unfinished last one.
        damaged: numbers of the lines that are damaged, from 1 on.
        missing: steps up to that step of which there is no line.
        saves: the steps that were saved.
    """

    later: int
    damaged: list[int]
    missing: list[int]
    saves: list[int]


def survey(path: Path, step: int) -> Survey:
    """What the file ``path`` holds for a run that goes on from ``step``; it need not exist.

    Raises:
        DiskError: if it cannot be read.
    """
    later = 0
    damaged, saves, seen = [], [], set()
    with closing(_read_lines(path)) as lines:
        for number, (line, record) in enumerate(lines, start=1):
            if record is None:
                if line.endswith(b"\n"):
                    damaged.append(number)
                else:
                    later += 1
                continue
            if record["event"] == "save":
                saves.append(record["step"])
            if not _stays(record, step):
                later += 1
                continue
            if record["event"] == "step":
                seen.add(record["step"])
    missing = [number for number in range(1, step + 1) if number not in seen]
    return Survey(later, damaged, missing, saves)


def _stays(record: Record, step: int) -> bool:
    return 0 < step >= record["step"]


def tell_damage(path: Path, step: int, found: Survey) -> None:
    """Warn of what the survey of ``path`` for a run at ``step`` misses."""
    if found.damaged:
        lines = f"line{'s' if len(found.damaged) > 1 else ''} {_some(found.damaged)}"
        logger.warning("%s: damaged %s; a start moves them to a file beside it", path, lines)
    if found.missing:
        count, steps = len(found.missing), _some(found.missing)
        logger.warning("%s: tells nothing of %d of the %d steps: %s", path, count, step, steps)


def begin_metrics(
    path: Path, step: int, start: Mapping[str, Any], beside: Mapping[Path, bytes]
) -> None:
    """Rewrite the metrics ``path`` for a run that goes on from ``step``, which begins with the
    record ``start``. What is taken out is kept in a file of its own.

    Args:
        beside: other files that appear with it; none of them does unless all can be written.

    Raises:
        DiskError: if a file cannot be written; nothing has changed then.
    """
    found = survey(path, step)
    cut = numbered(path.parent, "metrics-cut-", ".jsonl")
    targets = [cut] if found.later or found.damaged else []
    with atomic_writes(*targets, path, *beside) as files:
        new, removed = files[path], files.get(cut)
        with closing(_read_lines(path)) as lines:
            for line, record in lines:
                if record is not None and _stays(record, step):
                    new.write(line)
                else:
                    assert removed is not None, "the survey has seen these lines"
                    removed.write(line)
        new.write(encode_record(start))
        for other, content in beside.items():
            files[other].write(content)
    _tell_cut(path, cut, step, found)


def _tell_cut(path: Path, cut: Path, step: int, found: Survey) -> None:
    count = found.later + len(found.damaged)
    if count == 0:
        return
    why = "all, at a fresh start" if step == 0 else f"those after step {step}"
    if found.damaged:
        why += f", and {len(found.damaged)} damaged"
    level = logging.WARNING if step == 0 or found.damaged else logging.INFO
    logger.log(level, "%s: moved %d lines to %s: %s", path, count, cut.name, why)


def _read_lines(path: Path) -> Generator[tuple[bytes, Record | None], None, None]:
    try:
        with path.open("rb") as file:
            yield from decode_lines(file)
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
