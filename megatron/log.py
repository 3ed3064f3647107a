"""Logging of a run, set up once: rank 0 speaks, every rank reports its errors.

    rank 0         INFO to stdout        WARNING and above to stderr
    other ranks    nothing               ERROR and above to stderr

Modules only ask for their own logger, ``logging.getLogger(__name__)``.
"""

import logging
import sys

from megatron.errors import printable

LOGGER_NAME = "megatron"


def setup_logging(rank: int) -> None:
    """Give the loggers of ``megatron`` their handlers; a second call replaces the first.

    Lines carry date, time and level, and those of other ranks than 0 their rank.
    """
    logger = logging.getLogger(LOGGER_NAME)
    logger.setLevel(logging.INFO)
    # Handlers that a library puts on the root logger must not print our lines again.
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
    for handler in _handlers(rank):
        handler.setFormatter(_formatter(rank))
        logger.addHandler(handler)


def _handlers(rank: int) -> list[logging.Handler]:
    errors = logging.StreamHandler(sys.stderr)
    if rank != 0:
        errors.setLevel(logging.ERROR)
        return [errors]
    errors.setLevel(logging.WARNING)
    output = logging.StreamHandler(sys.stdout)
    output.addFilter(lambda record: record.levelno < logging.WARNING)
    return [output, errors]


def _formatter(rank: int) -> logging.Formatter:
    speaker = f"rank {rank}: " if rank > 0 else ""
    return _PrintableFormatter(
        f"%(asctime)s %(levelname)s {speaker}%(message)s", datefmt="%m-%d %H:%M:%S"
    )


class _PrintableFormatter(logging.Formatter):
    """Lines quote what was read: nothing of it may command the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
