"""How the command-line tools end: an error of ours is one message and its exit code."""

import sys
from collections.abc import Callable
from typing import NoReturn

from megatron.errors import RunError


def run_tool(main: Callable[[], int], *, rank: int = 0) -> NoReturn:
    """Leave the process with what ``main`` returns, or with the exit code of its RunError.

    An error that all ranks raise is told by rank 0.
    """
    try:
        sys.exit(main())
    except RunError as error:
        if not error.on_every_rank or rank == 0:
            sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
