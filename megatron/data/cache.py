"""Arrays that are slow to compute, kept as .npy files between runs, and verified when read.

A set of arrays has a stem, which holds a hash of everything that its content depends on. Each array
is a file STEM-NAME.npy. After the array, where readers of that format do not look, it ends with one
line that tells what the array is and has its hash.

What a run uses is what was computed: header and end of a file have to be, byte for byte, what they
would be if it were written now, and the array is hashed before its use. A set that is anything else
is computed anew, with a warning. Nothing that a file says is interpreted.

Files are memory-mapped, so that the processes of one machine share their memory, and written
atomically, so that jobs that start together need not know of each other: each that finds no set
computes the same content and puts it in place.

One process of a machine verifies for all. An ``ArrayCache`` remembers which files it has verified,
and what could not be kept; it is sent to the others, which open the same files at once, and verify
only what they do not find as the first has left it.
"""

import io
import json
import logging
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatron.atomic import atomic_write, make_folder
from megatron.errors import DiskError
from megatron.hashing import digest, hash_array, hash_file

logger = logging.getLogger(__name__)

Arrays: TypeAlias = dict[str, NDArray[Any]]
Stamp: TypeAlias = tuple[int, int, int, int]
"""What changes whenever a file is written: size, times and number of the file."""

_END_BYTES = 1024


@dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype that an array must have."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Length of the array in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def header(self) -> bytes:
        """What its .npy file begins with."""
        file = io.BytesIO()
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(file, header)
        return file.getvalue()


def cache_key(**values: object) -> str:
    """16 hex digits that stand for ``values``, which JSON must be able to hold."""
    text = json.dumps(values, sort_keys=True)
    return blake2b(text.encode(), digest_size=8).hexdigest()


def stamp(path: Path) -> Stamp:
    """The stamp of the file ``path``.

    Raises:
        OSError: if there is no such file.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@dataclass
class ArrayCache:
    """What a start knows of its sets of arrays, by their stems.

    Attributes:
        digests: of each set that was used; equal for equal arrays.
        stamps: of the files of each set that was verified.
        unkept: the sets that could not be written.
        closed: folders that cannot be written, which were told of.
    """

    digests: dict[str, str] = field(default_factory=dict)
    stamps: dict[str, dict[str, Stamp]] = field(default_factory=dict)
    unkept: dict[str, Arrays] = field(default_factory=dict)
    closed: set[Path] = field(default_factory=set)

    def get(
        self,
        folder: Path | None,
        stem: str,
        specs: Mapping[str, ArraySpec],
        build: Callable[[], Arrays],
    ) -> Arrays:
        """The arrays named in ``specs``, from ``folder`` if they are there, else from ``build``.

        What was built is kept in ``folder``. None keeps nothing; a folder that cannot be written
        keeps nothing either, with a warning.
        """
        if stem in self.unkept:
            return self.unkept[stem]
        kept = None if folder is None else self._read(_Files(folder, stem, specs))
        if kept is not None:
            return kept
        arrays = build()
        if folder is not None and folder not in self.closed:
            try:
                return self._write(_Files(folder, stem, specs), arrays)
            except DiskError as error:
                logger.warning("nothing is kept for the next start: %s", error)
                self.closed.add(folder)
        self.digests[stem] = _digest({name: hash_array(arrays[name]) for name in specs})
        self.unkept[stem] = arrays
        return arrays

    def only_unkept(self) -> "ArrayCache":
        """What processes that share no disk with this one cannot find by themselves."""
        digests = {stem: self.digests[stem] for stem in self.unkept}
        return ArrayCache(digests=digests, unkept=self.unkept)

    def take(self, other: "ArrayCache") -> None:
        """Add what ``only_unkept`` of another gave."""
        self.digests.update(other.digests)
        self.unkept.update(other.unkept)

    def _read(self, files: "_Files") -> Arrays | None:
        there = files.there()
        if not there:
            return None
        try:
            stamps = files.stamps()
            if self.stamps.get(files.stem) != stamps:
                self.digests[files.stem] = _digest(files.verify())
                self.stamps[files.stem] = stamps
            return files.map()
        except FileNotFoundError as error:
            logger.warning("%s: computed anew, because %s is missing", there[0], error.filename)
        except (OSError, ValueError) as error:
            logger.warning("%s: computed anew, because %s", there[0].with_name(files.stem), error)
        return None

    def _write(self, files: "_Files", arrays: Arrays) -> Arrays:
        hashes = files.write(arrays)
        try:
            stamps = files.stamps()
            # Those in the memory of this process alone are given up.
            arrays = files.map()
        except (OSError, ValueError) as error:
            raise DiskError(f"{files.folder / files.stem}: cannot be read back: {error}") from error
        self.digests[files.stem] = _digest(hashes)
        self.stamps[files.stem] = stamps
        return arrays


@dataclass(frozen=True)
class _Files:
    """The files of one set. All methods raise OSError or ValueError for what cannot be used."""

    folder: Path
    stem: str
    specs: Mapping[str, ArraySpec]

    def path(self, name: str) -> Path:
        return self.folder / f"{self.stem}-{name}.npy"

    def there(self) -> list[Path]:
        return [path for path in map(self.path, self.specs) if os.path.lexists(path)]

    def stamps(self) -> dict[str, Stamp]:
        return {name: stamp(self.path(name)) for name in self.specs}

    def map(self) -> Arrays:
        return {name: _map(self.path(name), spec) for name, spec in self.specs.items()}

    def verify(self) -> dict[str, str]:
        """The hashes of all arrays, which are what was written."""
        return {name: self._verify(name, spec) for name, spec in self.specs.items()}

    def _verify(self, name: str, spec: ArraySpec) -> str:
        path, header = self.path(name), spec.header()
        stop = len(header) + spec.nbytes
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError(f"{path.name} is not a regular file")
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                raise ValueError(f"{path.name} is another array")
            file.seek(stop)
            # The end is short; a file may be of any length.
            end = file.read(2 * _END_BYTES)
        found = hash_file(path, len(header), stop)
        if end != self._end(name, found):
            raise ValueError(f"{path.name} does not match the hash at its end")
        return found

    def write(self, arrays: Arrays) -> dict[str, str]:
        make_folder(self.folder)
        hashes = {name: hash_array(arrays[name]) for name in self.specs}
        for name, spec in self.specs.items():
            with atomic_write(self.path(name)) as file:
                file.write(spec.header())
                file.write(arrays[name].reshape(-1).view(np.uint8).data)
                file.write(self._end(name, hashes[name]))
        return hashes

    def _end(self, name: str, found: str) -> bytes:
        end = {"stem": self.stem, "name": name, "hash": found}
        return json.dumps(end).encode() + b"\n"


def _digest(hashes: Mapping[str, str]) -> str:
    return digest(json.dumps(hashes).encode()).hex()


def _map(path: Path, spec: ArraySpec) -> NDArray[Any]:
    if spec.nbytes == 0:
        # Nothing cannot be mapped.
        return np.empty(spec.shape, spec.dtype)
    # A plain array indexes faster than numpy's memmap class.
    return np.asarray(np.memmap(path, spec.dtype, "r", len(spec.header()), spec.shape))
