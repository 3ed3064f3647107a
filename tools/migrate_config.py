"""``bloom migrate``, as it was called in a checkout: python tools/migrate_config.py ..."""

import sys

from megatron.cli import run_tool
from megatron.commands.migrate import main

__all__ = ["main"]

if __name__ == "__main__":
    run_tool(lambda: main(sys.argv[1:]))
