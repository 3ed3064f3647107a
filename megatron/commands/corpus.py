"""Collect a small corpus from the Python installation that runs this, without any download.

    bloom corpus --output corpus.jsonl

Sources and texts of the standard library, and the help topics of pydoc: enough to try training on
real text. Tests, installed packages and exact duplicates are left out. Documents come in the order
of a hash of their names, which mixes the subjects, so that a validation split is like the rest.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from megatron.atomic import atomic_write, make_folder
from megatron.commands.arguments import CommandParser, add_overwrite, check_output

SUFFIXES = (".py", ".txt", ".rst", ".md")
TEXT_NAMES = ("README", "NEWS", "HISTORY", "LICENSE")
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TOPICS_SOURCE = "pydoc_data/topics.py"


@dataclass(frozen=True)
class Document:
    """One text and where it comes from."""

    source: str
    text: str


def library_documents(root: Path) -> Iterator[Document]:
    """Sources and texts below ``root``, except those that are not UTF-8."""
    for path in root.rglob("*"):
        relative = path.relative_to(root)
        wanted = path.name.endswith(SUFFIXES) or path.stem in TEXT_NAMES
        if not wanted or SKIPPED_FOLDERS.intersection(relative.parts) or not path.is_file():
            continue
        # The topics are collected one by one.
        if relative.as_posix() == TOPICS_SOURCE:
            continue
        try:
            yield Document(relative.as_posix(), path.read_text("utf-8"))
        except UnicodeDecodeError:
            continue


def topic_documents() -> Iterator[Document]:
    """The help topics of pydoc."""
    for name, text in topics.items():
        yield Document(f"pydoc_data/topics/{name}", text)


def choose(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    """Documents in mixed order, each text once, as many as have ``max_bytes`` of text."""
    seen = set()
    total = 0
    for document in sorted(documents, key=lambda one: _digest(one.source)):
        content = _digest(document.text)
        if content in seen or not document.text.strip():
            continue
        seen.add(content)
        total += len(document.text.encode())
        if max_bytes is not None and total > max_bytes:
            return
        yield document


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def main(argv: Sequence[str]) -> int:
    """Write the corpus that the command line asks for; return the exit code."""
    parser = CommandParser(
        "corpus",
        "Collect a small corpus from the Python installation that runs this, to try with.",
        ["bloom corpus --output corpus.jsonl"],
    )
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument(
        "--max_bytes", type=int, help="stop before so many bytes of text (default: all)"
    )
    add_overwrite(parser)
    args = parser.parse(argv)
    check_output(args, "--output", [args.output])
    root = Path(sysconfig.get_path("stdlib"))
    documents = list(choose([*library_documents(root), *topic_documents()], args.max_bytes))
    make_folder(args.output.parent)
    with atomic_write(args.output) as file:
        for document in documents:
            record = {"text": document.text, "source": document.source}
            file.write(json.dumps(record).encode() + b"\n")
    size = sum(len(document.text.encode()) for document in documents)
    print(f"wrote {args.output}: {len(documents)} documents, {size:,} bytes of text")
    return 0
