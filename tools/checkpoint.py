"""``bloom verify`` and ``bloom inspect``, as they were called: checkpoint.py verify RUN."""

import sys
from collections.abc import Sequence

from megatron.cli import run_tool
from megatron.commands.saves import inspect, verify
from megatron.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Run ``verify RUN`` or ``inspect RUN``; return the exit code."""
    verbs = {"verify": verify, "inspect": inspect}
    if not argv or argv[0] not in verbs:
        raise ConfigError("give verify or inspect, and the folder of a run or of a save")
    return verbs[argv[0]](argv[1:])


if __name__ == "__main__":
    run_tool(lambda: main(sys.argv[1:]))
