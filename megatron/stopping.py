"""Stopping on request: the signals that ask a run to leave.

Before the first step there is nothing to save, and a signal ends the process where it is. From then
on it is noted, and the run saves after the step that it is at.

Python looks at signals between two of its own instructions only. A process that waits inside torch
for another rank would not hear of one, so that a thread hears of it too.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from megatron.cli import leave
from megatron.errors import StoppedOnRequestError

logger = logging.getLogger(__name__)

NOTHING_CHANGED = "stopped on request before the first step; nothing was changed"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

_GRACE_SECONDS = 1.5
"""Within which a process that is not inside torch has heard of a signal by itself."""


class _Stop(BaseException):  # noqa: N818
    """Not an Exception, which libraries catch, and turn into errors of their own."""


class StopSignals:
    """Heeds the signals that ask a run to stop, for the length of a ``with``.

    Outside the main thread, where Python allows no handlers, it heeds none. A SIGHUP that was
    ignored before, as nohup does, stays ignored. A second SIGINT interrupts at once.

    Args:
        leave: called in a thread, to end the process, if it waits inside torch; None tells so and
            ends it. Else leaving the ``with`` raises a StoppedOnRequestError.
    """

    def __init__(self, leave: Callable[[StoppedOnRequestError], None] | None = None) -> None:
        self._leave = leave or _leave
        self._before: dict[int, Any] = {}
        self._received: int | None = None
        self._interrupts = True
        self._heard = threading.Event()
        self._last_acts: list[Callable[[], None]] = []

    @property
    def received(self) -> bool:
        """Whether a signal has asked to stop."""
        return self._received is not None

    def only_note(self) -> None:
        """From now on only note signals, for the run to look at."""
        self._interrupts = False
        self._heard.set()

    def before_leaving(self, action: Callable[[], None]) -> None:
        """Call ``action`` before a thread ends the process, which passes by every ``finally``."""
        self._last_acts.append(action)

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(target=self._listen, args=(reader,), daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        os.register_at_fork(after_in_child=self._restore)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._heard.set()
        if self._before:
            self._restore()
            os.write(self._writer, b"\0")
            self._thread.join()
            os.close(self._writer)
        if isinstance(error, _Stop):
            raise StoppedOnRequestError(NOTHING_CHANGED) from None

    def _restore(self) -> None:
        """Give signals back to who had them; a forked process is asked to stop by itself."""
        if not self._before:
            return
        self._interrupts = False
        # One that comes meanwhile waits until its handler is the former one: Python would find that
        # one in the place of the one that was to be called, and complain.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, self._before)
        try:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received == number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self._received = self._received is None, number
        if self._interrupts and first:
            raise _Stop

    def _listen(self, reader: int) -> None:
        """Leave in the place of a process that does not hear."""
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            while (byte := pipe.read(1)) and byte != b"\0":
                if byte[0] in SIGNALS and not self._heard.wait(_GRACE_SECONDS):
                    for action in self._last_acts:
                        action()
                    self._leave(StoppedOnRequestError(NOTHING_CHANGED))


def _leave(error: StoppedOnRequestError) -> None:
    logger.info("%s", error)
    leave(error.exit_code)
