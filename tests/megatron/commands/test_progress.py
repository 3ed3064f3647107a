"""The progress of a long work, on a terminal and elsewhere."""

from io import StringIO
from pathlib import Path

import pytest

from megatron.commands.progress import Progress, bytes_to_read


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def told(stream: StringIO, total: int | None, seconds: tuple[float, ...]) -> str:
    """What is told of a work that reads a megabyte a second, asked at these times."""
    now = 0.0
    progress = Progress(total, stream=stream, clock=lambda: now)
    for moment in seconds:
        now = moment
        progress.update(int(moment * 1e6), "3 documents")
    progress.close()
    return stream.getvalue()


def test_lines_tell_share_speed_and_end_every_few_seconds() -> None:
    assert told(StringIO(), 80_000_000, (1, 4.9, 5, 9, 20)) == (
        "6% of 80.0 MB, 1.0 MB/s, 3 documents, 0:01:15 to go\n"
        "25% of 80.0 MB, 1.0 MB/s, 3 documents, 0:01:00 to go\n"
    )


def test_without_a_total_neither_share_nor_end_is_told() -> None:
    assert told(StringIO(), None, (5,)) == "5.0 MB, 1.0 MB/s, 3 documents\n"


def test_a_terminal_has_a_bar_in_one_line_that_goes_in_the_end() -> None:
    text = told(Terminal(), 8_000_000, (2, 2.1, 4))
    assert text.split("\r\x1b[K") == [
        "",
        "[######..................] 25% of 8.0 MB, 1.0 MB/s, 3 documents, 0:00:06 to go",
        "[############............] 50% of 8.0 MB, 1.0 MB/s, 3 documents, 0:00:04 to go",
        "",
    ]


@pytest.mark.parametrize(("name", "expected"), [("b.jsonl", 7), ("b.jsonl.gz", None)])
def test_compressed_files_have_no_known_size(
    tmp_path: Path, name: str, expected: int | None
) -> None:
    paths = [tmp_path / "a.txt", tmp_path / name]
    paths[0].write_bytes(b"123")
    paths[1].write_bytes(b"4567")
    assert bytes_to_read(paths) == expected
