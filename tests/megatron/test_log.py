"""Who speaks, where, and how often."""

import logging
import re
from collections.abc import Iterator

import pytest

from megatron.log import LOGGER_NAME, setup_logging


@pytest.fixture(autouse=True)
def restored_logger() -> Iterator[None]:
    logger = logging.getLogger(LOGGER_NAME)
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def speak() -> None:
    logger = logging.getLogger("megatron.some.module")
    logger.debug("a detail")
    logger.info("a step")
    logger.warning("a warning")
    logger.error("an error")


def test_rank_0_informs_on_stdout_and_warns_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=0)
    speak()
    out, err = capsys.readouterr()
    assert [line.split(" ", 2)[2] for line in out.splitlines()] == ["INFO a step"]
    assert [line.split(" ", 2)[2] for line in err.splitlines()] == [
        "WARNING a warning",
        "ERROR an error",
    ]


def test_other_ranks_only_report_errors(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=3)
    speak()
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(" ", 2)[2] for line in err.splitlines()] == ["ERROR rank 3: an error"]


def test_lines_begin_with_date_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=0)
    speak()
    assert re.fullmatch(r"\d\d-\d\d \d\d:\d\d:\d\d INFO a step\n", capsys.readouterr().out)


def test_a_second_setup_does_not_double_lines(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=0)
    setup_logging(rank=0)
    speak()
    assert capsys.readouterr().out.count("a step") == 1


def test_handlers_of_the_root_logger_do_not_double_lines(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(rank=0)
    speak()
    assert "a step" in capsys.readouterr().out
    assert caplog.records == []


def test_loggers_of_libraries_are_left_alone() -> None:
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    setup_logging(rank=0)
    assert (root.level, root.handlers) == before
