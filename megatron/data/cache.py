"""Arrays that are slow to compute, kept as .npy files between runs.

A file is named after everything that its content depends on, so that it never goes stale, and is
written atomically, so that ranks and jobs that start together need not know of each other: each
that finds no file computes the same content and puts it in place. A file that is not what was asked
for is computed anew. Files are memory-mapped, so that the ranks of one machine share their memory.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.atomic import atomic_write, make_folder
from megatron.errors import DiskError

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype that an array must have."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def cache_key(**values: object) -> str:
    """16 hex digits that stand for ``values``, which JSON must be able to hold."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def cached_arrays(
    folder: Path | None, stem: str, specs: Mapping[str, ArraySpec], build: Callable[[], Arrays]
) -> Arrays:
    """The arrays named in ``specs``, from ``folder`` if they are there, else from ``build``.

    What was built is kept in ``folder`` as STEM-NAME.npy. None keeps nothing; a folder that cannot
    be written keeps nothing either, with a warning.
    """
    if folder is None:
        return build()
    paths = {name: folder / f"{stem}-{name}.npy" for name in specs}
    kept = _load(paths, specs)
    if kept is not None:
        return kept
    arrays = build()
    try:
        _save(folder, paths, arrays)
    except DiskError as error:
        logger.warning("nothing is kept for the next start: %s", error)
    return arrays


def _load(paths: Mapping[str, Path], specs: Mapping[str, ArraySpec]) -> Arrays | None:
    arrays = {}
    for name, spec in specs.items():
        try:
            array = np.load(paths[name], mmap_mode="r", allow_pickle=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, EOFError) as error:
            logger.warning("%s: computed anew, because it cannot be read: %s", paths[name], error)
            return None
        if (array.shape, array.dtype) != (spec.shape, spec.dtype):
            logger.warning("%s: computed anew, because it is another array", paths[name])
            return None
        # A plain array indexes faster than numpy's memmap class.
        arrays[name] = np.asarray(array)
    return arrays


def _save(folder: Path, paths: Mapping[str, Path], arrays: Arrays) -> None:
    make_folder(folder)
    for name, path in paths.items():
        with atomic_write(path) as file:
            np.save(file, arrays[name], allow_pickle=False)
