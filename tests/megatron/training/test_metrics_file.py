"""Lines of metrics that tell whether they are as they were written, and what a start moves."""

import json
import logging
import os
from pathlib import Path

import pytest

from megatron.errors import DiskError
from megatron.training.metrics_file import (
    Record,
    begin_metrics,
    decode_lines,
    encode_record,
    last_save,
    survey,
    tell_damage,
)

START: Record = {"event": "start", "step": 0}


def lines(*steps: int) -> list[bytes]:
    return [encode_record({"event": "step", "step": step, "loss": 3.25}) for step in steps]


def write(folder: Path, *steps: int) -> Path:
    path = folder / "metrics.jsonl"
    path.write_bytes(b"".join(lines(*steps)))
    return path


def steps(path: Path) -> list[int | None]:
    """The steps of all lines; None for those that are damaged."""
    with path.open("rb") as file:
        return [None if record is None else record["step"] for _, record in decode_lines(file)]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_line_is_json_with_a_sum_which_readers_do_not_see() -> None:
    (line,) = lines(7)
    assert set(json.loads(line)) == {"event", "step", "loss", "crc32"}
    ((_, record),) = decode_lines([line])
    assert record == {"event": "step", "step": 7, "loss": 3.25}


def test_every_flipped_bit_of_a_number_is_found() -> None:
    (before, line) = lines(6, 7)
    for bit in range(8 * len(line)):
        flipped = bytearray(line)
        flipped[bit // 8] ^= 1 << bit % 8
        (_, record) = list(decode_lines([before, bytes(flipped)]))[1]
        assert record is None, bit


def test_every_cut_of_a_line_is_found() -> None:
    (line,) = lines(7)
    assert [record for n in range(len(line)) for _, record in decode_lines([line[:n]])] == (
        [None] * len(line)
    )


def test_lines_without_sums_are_believed_until_one_has_a_sum() -> None:
    old = b'{"event": "step", "step": 1}\n'
    records = [record for _, record in decode_lines([old, *lines(2), old])]
    assert [record is None for record in records] == [False, False, True]


def test_lines_after_the_step_are_moved_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = write(tmp_path, 1, 2, 3, 4, 5)
    begin_metrics(survey(path, 3), {**START, "step": 3}, {})
    assert path.read_bytes().startswith(b"".join(lines(1, 2, 3)))
    assert steps(path) == [1, 2, 3, 3]
    cut = tmp_path / "metrics-cut-0001.jsonl"
    assert cut.read_bytes() == b"".join(lines(4, 5))
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage() == f"{path}: moved 2 lines to {cut.name}: those after step 3"
    write(tmp_path, 1, 2)
    begin_metrics(survey(path, 1), START, {})
    assert names(tmp_path) == [cut.name, "metrics-cut-0002.jsonl", path.name]
    assert steps(tmp_path / "metrics-cut-0002.jsonl") == [2]


def test_a_fresh_start_sets_the_old_metrics_aside_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, 1, 2)
    begin_metrics(survey(path, 0), START, {})
    assert steps(path) == [0]
    assert steps(tmp_path / "metrics-cut-0001.jsonl") == [1, 2]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "moved 2 lines to metrics-cut-0001.jsonl: all, at a fresh start" in caplog.text


def test_nothing_is_moved_where_nothing_has_to_be(tmp_path: Path) -> None:
    path = write(tmp_path, 1, 2)
    begin_metrics(survey(path, 2), START, {})
    assert names(tmp_path) == [path.name]
    assert steps(path) == [1, 2, 0]


def test_damaged_lines_are_named_and_moved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, 1, 2, 3)
    content = path.read_bytes().replace(b'"step": 2', b'"step": 0')
    path.write_bytes(content + b'{"event": "st')
    tell_damage(survey(path, 3))
    assert "metrics.jsonl: damaged line 2;" in caplog.text
    assert "tells nothing of 1 of the 3 steps: 2" in caplog.text
    begin_metrics(survey(path, 3), START, {})
    assert steps(path) == [1, 3, 0]
    assert (tmp_path / "metrics-cut-0001.jsonl").read_bytes().endswith(b'{"event": "st')
    assert (
        "moved 2 lines to metrics-cut-0001.jsonl: those after step 3, and 1 damaged" in caplog.text
    )


def test_missing_metrics_of_a_run_that_goes_on_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    tell_damage(survey(path, 7))
    assert "tells nothing of 7 of the 7 steps: 1, 2, 3, 4, 5 and 2 more" in caplog.text


@pytest.mark.parametrize("blocked", ["config.yaml", "metrics.jsonl", "other"])
def test_nothing_changes_unless_all_can_be_written(tmp_path: Path, blocked: str) -> None:
    path = write(tmp_path, 1, 2)
    if blocked == "other":
        beside = {tmp_path / "no/such/folder": b"", tmp_path / "config.yaml": b"new"}
    else:
        (tmp_path / blocked).unlink(missing_ok=True)
        (tmp_path / blocked).mkdir()
        beside = {tmp_path / "config-0001.yaml": b"new", tmp_path / "config.yaml": b"new"}
    before = names(tmp_path)
    with pytest.raises(DiskError):
        begin_metrics(survey(path, 1), START, beside)
    assert names(tmp_path) == before
    if blocked != "metrics.jsonl":
        assert steps(path) == [1, 2]


def test_the_last_save_is_known_and_damaged_lines_are_not_believed(tmp_path: Path) -> None:
    path = write(tmp_path, 1, 2)
    assert last_save(path) == last_save(tmp_path / "none") == 0
    with path.open("ab") as file:
        for step in (1, 2, 9):
            file.write(encode_record({"event": "save", "step": step}))
    path.write_bytes(path.read_bytes().replace(b'"step": 9', b'"step": 8'))
    assert last_save(path) == 2
