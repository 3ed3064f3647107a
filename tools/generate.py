"""``bloom generate``, as it was called in a checkout: python tools/generate.py ..."""

import sys

from megatron.cli import run_tool
from megatron.commands.generate import main

__all__ = ["main"]

if __name__ == "__main__":
    run_tool(lambda: main(sys.argv[1:]))
