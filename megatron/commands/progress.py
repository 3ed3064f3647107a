"""How far a long work has come: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import TextIO

_SECONDS_ON_TERMINAL = 0.2
_SECONDS_ELSEWHERE = 5.0
_WIDTH = 24
_CLEAR = "\r\x1b[K"


class Progress:
    """Tells the share that is done, the speed, and when it will be all.

    Args:
        total: bytes that the work reads; None if nobody knows, and then neither share nor end is
            told.
        stream: None is stderr, so that what the work prints can be piped on.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        total: int | None,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._on_terminal = self._stream.isatty()
        self._started = self._told = clock()

    @property
    def seconds(self) -> float:
        """Since the work began, above 0."""
        return max(self._clock() - self._started, 1e-9)

    def update(self, done: int, more: str = "") -> None:
        """Tell it, if it is time.

        Args:
            done: bytes that have been read.
            more: what else there is to tell.
        """
        pause = _SECONDS_ON_TERMINAL if self._on_terminal else _SECONDS_ELSEWHERE
        if self._clock() - self._told < pause:
            return
        self._told = self._clock()
        line = self._line(done, more)
        self._stream.write(f"{_CLEAR}{line}" if self._on_terminal else f"{line}\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave a terminal's line as it was before."""
        if self._on_terminal:
            self._stream.write(_CLEAR)
            self._stream.flush()

    def _line(self, done: int, more: str) -> str:
        rate = done / self.seconds
        parts = [f"{done / 1e6:,.1f} MB", f"{rate / 1e6:.1f} MB/s", *([more] if more else [])]
        if self._total is None or self._total == 0:
            return ", ".join(parts)
        share = min(done / self._total, 1.0)
        left = (self._total - done) / rate if rate > 0 else 0.0
        filled = round(_WIDTH * share)
        bar = f"[{'#' * filled}{'.' * (_WIDTH - filled)}] " if self._on_terminal else ""
        return f"{bar}{share:.0%} of {self._total / 1e6:,.1f} MB, " + ", ".join(
            [*parts[1:], f"{timedelta(seconds=round(max(left, 0.0)))} to go"]
        )


def bytes_to_read(files: Iterable[Path]) -> int | None:
    """Bytes of all ``files``; None if one is compressed, and has more to read than it is long."""
    sizes = [None if path.suffix == ".gz" else path.stat().st_size for path in files]
    return None if None in sizes else sum(size for size in sizes if size is not None)
