"""The saves of a run: one folder each, complete or not there.

What is not there and what cannot be read are two things. Nothing here takes a save that is damaged,
or a disk that fails, for a save that was never made.

step-00000100                   a save; one without a valid manifest is damaged, not absent
.step-00000100.tmp-1f3a         a save being written or removed; leftover if nobody is at it
step-00000100.damaged-1f3a      a damaged save, set aside so that its step can be saved again
"""

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron.checkpoint.format import find_member, read_manifest
from megatron.errors import CheckpointError

logger = logging.getLogger(__name__)

STEP_FOLDER = re.compile(r"step-(\d{8,})")
TEMPORARY = ".step-*.tmp-*"


def step_folder(folder: Path, step: int) -> Path:
    """Where the save of ``step`` lies."""
    return folder / f"step-{step:08d}"


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Steps and paths of what is named like a save in ``folder``, oldest first, valid or not.

    Raises:
        CheckpointError: if ``folder`` is there, but cannot be read.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from error
    named = ((STEP_FOLDER.fullmatch(name), folder / name) for name in names)
    return sorted((int(match[1]), path) for match, path in named if match is not None)


def find_latest(folder: Path) -> Path | None:
    """The newest save in ``folder``, or None if there is none. Opening it tells if it is damaged.

    Raises:
        CheckpointError: if ``folder`` is there, but cannot be read.
    """
    return next((path for _, path in reversed(step_folders(folder))), None)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and paths of the saves in ``folder`` that seem whole, oldest first.

    Their manifests are valid, and all files are there in full length; hashes are compared when a
    save is opened. Others are logged.
    """
    whole = []
    for step, path in step_folders(folder):
        reason = find_fault(path)
        if reason is None:
            whole.append((step, path))
        else:
            logger.warning("not a valid checkpoint: %s", reason)
    return whole


def find_fault(path: Path) -> str | None:
    """Why ``path`` is not a save with a valid manifest and all its files; None if it is one.

    For a look at all saves: no file but the manifest is read.
    """
    try:
        for name, stored in read_manifest(path).files.items():
            member = find_member(path, name)
            size = member.stat().st_size
            if size != stored.bytes:
                return f"{member}: is damaged: {size} bytes long, expected {stored.bytes}"
        return None
    except (CheckpointError, OSError) as error:
        return str(error)


def is_valid(path: Path) -> bool:
    """Whether ``path`` is a save with a valid manifest; if not, the reason is logged.

    Raises:
        OSError: if that cannot be told.
    """
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
    """Rename a damaged save, so that its step can be saved again and nothing is lost."""
    target = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
    path.rename(target)
    logger.warning("moved the damaged checkpoint %s to %s", path, target.name)


def remove_leftovers(folder: Path) -> None:
    """Remove what saves that were killed have left in ``folder``."""
    for path in folder.glob(TEMPORARY):
        shutil.rmtree(path, ignore_errors=True)


def remove_old(folder: Path, newest: Path, keep_last: int) -> None:
    """Keep ``newest`` and so many other whole saves that ``keep_last`` remain; 0 keeps all.

    Damaged ones neither count nor are removed. A save that cannot be removed is logged, since the
    new one is complete.
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
