"""How the command-line tools end: an error of ours is one message and its exit code."""

import sys
from collections.abc import Callable
from typing import NoReturn

from megatron.errors import RunError


def run_tool(main: Callable[[], int]) -> NoReturn:
    """Leave the process with what ``main`` returns, or with the exit code of its RunError."""
    try:
        sys.exit(main())
    except RunError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
