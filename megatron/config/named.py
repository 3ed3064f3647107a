"""The configs that come with the package, which ``--config`` takes by their names."""

from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).with_name("configs")


@cache
def config_names() -> tuple[str, ...]:
    """Their names, such as ``bloom-560m``."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def config_path(given: str) -> Path:
    """The file that ``--config`` names: one of the package by its name, or else by its path.

    A file in the current folder with the name of one of the package is given as ``./NAME``.
    """
    return _FOLDER / f"{given}.yaml" if given in config_names() else Path(given)


def about_names(given: str) -> str:
    """For a message that there is no such file: which names there are, if it looks like one."""
    if "/" in given or "." in given:
        return ""
    return f"; the configs that come with bloom are {', '.join(config_names())}"
