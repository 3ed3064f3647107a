"""``bloom version``: what a report of a defect begins with."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from megatron.commands.arguments import CommandParser

_PACKAGE = "bloom-pretrain"


def main(argv: Sequence[str]) -> int:
    """Print the versions."""
    CommandParser(
        "version", "Print the versions of bloom, torch and Python.", ["bloom version"]
    ).parse(argv)
    print(f"bloom {_installed(_PACKAGE)}")
    print(f"torch {_installed('torch')}")
    print(f"Python {platform.python_version()}")
    return 0


def _installed(package: str) -> str:
    # Asked of the files of the package: importing torch takes seconds.
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
