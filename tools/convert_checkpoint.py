"""``bloom export``, as it was called: convert_checkpoint.py to-hf --checkpoint RUN ..."""

import sys
from collections.abc import Sequence

from megatron.cli import run_tool
from megatron.commands.export import main as export
from megatron.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Run ``to-hf`` with the options of ``bloom export``; return the exit code."""
    first, *options = argv or [""]
    if first in ("-h", "--help"):
        return export([first])
    if first != "to-hf":
        raise ConfigError("give to-hf first, and then the options of bloom export")
    return export(options)


if __name__ == "__main__":
    run_tool(lambda: main(sys.argv[1:]))
