"""Stopping on request: a signal asks, and all ranks leave after the same step."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Notes the signals that ask a run to save and leave.

    Signals arrive on one rank, or on several at different steps, so that the ranks agree on them
    after each step. A second SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    def agreed(self) -> bool:
        """Whether any rank has been asked to stop. Collective."""
        # On the CPU, so that no GPU has to be waited for.
        flag = torch.tensor(int(self._received is not None))
        if dist.get_world_size() > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
