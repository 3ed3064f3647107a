"""Text files as documents, for the tools that tokenize them.

.txt                one document, the whole file
.jsonl, .jsonl.gz   one document a line: a JSON object with the text under one key
a folder            all such files in it and below it, in the order of their paths
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import DataError
from megatron.plain import PlainDataError, leads_out, open_file, read_file

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
MOST_LINE_BYTES = 1 << 28


class BadRecordError(ValueError):
    """A record that holds no usable text; the message says why."""


@dataclass(frozen=True)
class Record:
    """One document as it lies in its file.

    Attributes:
        place: file and line, to be named in messages.
        content: bytes of the line or of the file.
        is_json: whether the text is in a JSON object.
    """

    place: str
    content: bytes
    is_json: bool

    def text(self, json_key: str) -> str:
        """The text of the document.

        Raises:
            BadRecordError: if there is none.
        """
        try:
            text = self.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadRecordError("not UTF-8") from error
        if self.is_json and text.strip():
            text = _text_of_json(text, json_key)
        if not text.strip():
            raise BadRecordError("empty")
        return text


def _text_of_json(line: str, key: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecordError("not JSON") from error
    if not isinstance(value, dict) or key not in value:
        raise BadRecordError(f"no key {key!r}")
    text = value[key]
    if not isinstance(text, str):
        raise BadRecordError(f"{key!r} is not text")
    try:
        # JSON can spell half of a surrogate pair, which no encoding can hold.
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(f"{key!r} is not Unicode text") from error
    return text


def find_files(inputs: Iterable[Path]) -> list[Path]:
    """The files of ``inputs``, folders replaced by the files in them.

    Raises:
        DataError: if an input does not exist, is of another type, or is a folder without files.
    """
    return [file for path in inputs for file in _expand(path)]


def _expand(path: Path) -> list[Path]:
    expected = ", ".join(SUFFIXES)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"{path}: no files in this folder; expected {expected}")
        for file in files:
            outside = leads_out(file, path)
            if outside is not None:
                raise DataError(
                    f"{file}: is a link to {outside}, outside of the folder; give that file itself"
                )
        return files
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: is of an unknown type; expected {expected}")
    return [path]


def read_records(files: Iterable[Path]) -> Iterator[Record]:
    """The records of all files, in order, good or bad.

    Raises:
        DataError: if a file cannot be read.
    """
    for path in files:
        try:
            yield from _read_file(path)
        except (OSError, EOFError, zlib.error, PlainDataError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error


def _read_file(path: Path) -> Iterator[Record]:
    if path.suffix == ".txt":
        yield Record(str(path), read_file(path), is_json=False)
        return
    with open_file(path) as plain, gzip.open(plain) if path.suffix == ".gz" else plain as file:
        # A compressed line of a few bytes may be as long as it likes.
        lines = iter(lambda: file.readline(MOST_LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > MOST_LINE_BYTES:
                raise PlainDataError(f"line {number} has more than {MOST_LINE_BYTES} bytes")
            yield Record(f"{path}:{number}", line, is_json=True)
