"""The saves of a run: one folder each, complete or not there.

step-00000100                   a save, if its manifest is valid
.step-00000100.tmp-1f3a         a save being written or removed; leftover if nobody is at it
step-00000100.damaged-1f3a      a save without a valid manifest, set aside for another one
"""

import logging
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron.checkpoint.format import read_manifest
from megatron.errors import CheckpointError

logger = logging.getLogger(__name__)

STEP_FOLDER = re.compile(r"step-(\d{8,})")
TEMPORARY = ".step-*.tmp-*"


def step_folder(folder: Path, step: int) -> Path:
    """Where the save of ``step`` lies."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and paths of the valid saves in ``folder``, oldest first.

    A save is valid if its manifest is; its other files are verified when it is opened. Folders that
    look like a save and are not valid are logged.
    """
    return [(step, path) for step, path in _step_folders(folder) if is_valid(path)]


def find_latest(folder: Path) -> Path | None:
    """The newest valid save in ``folder``, or None. Newer invalid ones are logged."""
    newest_first = reversed(_step_folders(folder))
    return next((path for _, path in newest_first if is_valid(path)), None)


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    paths = folder.iterdir() if folder.is_dir() else iter(())
    named = ((STEP_FOLDER.fullmatch(path.name), path) for path in paths)
    return sorted((int(match[1]), path) for match, path in named if match is not None)


def is_valid(path: Path) -> bool:
    """Whether ``path`` is a save with a valid manifest; if not, the reason is logged."""
    try:
        read_manifest(path)
    except CheckpointError as error:
        logger.warning("not a valid checkpoint: %s", error)
        return False
    return True


def temporary_folder(path: Path) -> Path:
    """A new name for the save ``path`` while it is written or removed."""
    return path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")


def set_aside(path: Path) -> None:
    """Rename an invalid save, so that its step can be saved again and nothing is lost."""
    target = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
    path.rename(target)
    logger.warning("moved the invalid checkpoint %s to %s", path, target)


def remove_leftovers(folder: Path) -> None:
    """Remove what saves that were killed have left in ``folder``."""
    for path in folder.glob(TEMPORARY):
        shutil.rmtree(path, ignore_errors=True)


def remove_old(folder: Path, newest: Path, keep_last: int) -> None:
    """Keep ``newest`` and so many other valid saves that ``keep_last`` remain; 0 keeps all.

    A save that cannot be removed is logged, since the new one is complete.
    """
    for path in _superfluous(folder, newest, keep_last):
        try:
            # A removal that is killed half-way must not leave half a save under its name.
            shutil.rmtree(path.rename(temporary_folder(path)))
        except OSError as error:
            logger.warning("cannot remove the old checkpoint %s: %s", path, error)


def _superfluous(folder: Path, newest: Path, keep_last: int) -> Iterator[Path]:
    if keep_last > 0:
        for _, path in list_checkpoints(folder)[:-keep_last]:
            if path != newest:
                yield path
