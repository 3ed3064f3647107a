"""Ranks that are on a machine of some name, as far as the lock of a run folder can tell.

What the lock takes for the name and the boot of the machine is replaced in the rank. The time
without a sign of life, after which a holder on another machine is taken for dead, is short.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.training import run_lock, trainer
from megatron.training.reporter import Reporter

PATIENCE, BEAT, POLL = 2.0, 0.2, 0.1


def be_on(
    machine: str, wait_at: int = 0, until: Path | None = None, patience: float = PATIENCE
) -> None:
    """Make this process one of ``machine``, which waits at a step ``until`` there is a file."""
    this_process = run_lock.this_process

    def me() -> run_lock.Holder:
        return replace(this_process(), host=machine, boot=f"boot of {machine}")

    lock = partial(run_lock.RunLock, patience=patience, beat=BEAT, poll=POLL)
    setattr(run_lock, "this_process", me)  # noqa: B010
    setattr(trainer, "held", partial(run_lock.held, make=lock))  # noqa: B010
    if until is None:
        return
    tell = Reporter.step

    def tell_and_wait(self: Reporter, progress: Any, *args: Any) -> None:
        tell(self, progress, *args)
        while progress.step == wait_at and not until.exists():
            time.sleep(0.05)

    setattr(Reporter, "step", tell_and_wait)  # noqa: B010
