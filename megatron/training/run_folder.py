"""What a run folder may hold before a run writes into it.

The folder itself may be a link: its name was given. What lies in it under the names that a run uses
was not: a link there would have the run read, overwrite or remove a file somewhere else.
"""

import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path

from megatron.errors import CheckpointError, DiskError
from megatron.plain import leads_out

_USED = (
    "checkpoints",
    "checkpoints/*",
    "config.yaml",
    "config-*.yaml",
    "metrics*",
    "run.lock*",
    "tensorboard",
    "tensorboard/*",
)
_FOLDERS = ("checkpoints", "tensorboard")


def check_run_folder(folder: Path) -> None:
    """Refuse a folder with links that lead out of it, and files that are none.

    Raises:
        CheckpointError: for a save, or the folder of the saves.
        DiskError: for anything else.
    """
    for path in _used(folder):
        saves = path.relative_to(folder).parts[0] == "checkpoints"
        error = CheckpointError if saves else DiskError
        outside = leads_out(path, folder)
        if outside is not None:
            raise error(
                f"{path}: is a link to {outside}, outside of the run folder; a run follows none",
                on_every_rank=True,
            )
        is_folder = path.relative_to(folder).parts[0] in _FOLDERS
        if path.exists() and not (path.is_file() or (is_folder and path.is_dir())):
            raise error(f"{path}: is not a regular file", on_every_rank=True)


def _used(folder: Path) -> Iterator[Path]:
    """What is there under a name that a run uses, the outer ones first."""
    for pattern in _USED:
        above, _, name = pattern.rpartition("/")
        try:
            # Links that lead nowhere are listed too.
            names = os.listdir(folder / above)
        except OSError:
            # It is not there yet, or the run will tell why it cannot be used.
            continue
        yield from (folder / above / found for found in sorted(fnmatch.filter(names, name)))
