"""What the start of a large run exchanges and computes, before and after it was shared out.

    python -m megatron.benchmarks.starts [--json FILE]

BLOOM 176B on 384 ranks (tensor 4, pipeline 12, data 8; 48 nodes of 8) and its blend of 60 datasets,
of which 220 million samples are read, simulated on one process: what is sent is really pickled and
its bytes counted, for each rank that gets them; the blend is really computed, kept, verified and
opened. Before, what one rank had found out was gathered from all ranks, which padded it to the
longest and allocated it for each of them, and every rank that reads data computed the blend, in one
thread; the former loop is timed on a tenth of the samples.
"""

import math
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.benchmarks.program import Run, run_benchmark
from megatron.benchmarks.result import MIB
from megatron.checkpoint.format import Manifest, StoredBox, StoredFile, StoredTensor
from megatron.cli import run_tool
from megatron.data.blend import BlendedSamples
from megatron.data.cache import ArrayCache
from megatron.report.tables import Row, Table

TENSOR, PIPELINE, DATA, RANKS_OF_NODE = 4, 12, 8, 8
RANKS = TENSOR * PIPELINE * DATA
NODES = RANKS // RANKS_OF_NODE
READERS = RANKS // TENSOR
DATASETS = 60
LAYERS, LAYER_TENSORS, KINDS = 70, 12, ("weight", "exp_avg", "exp_avg_sq")
TOKENS_BYTES = 350e9 * 4
_NUMBER = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    description = "What the start of 384 ranks exchanges and computes."
    return run_benchmark("starts", description, measure, argv, timed=False)


def measure(run: Run) -> Iterator[Table]:
    """The tables of what is exchanged, and of the data."""
    yield Table(f"What {RANKS} ranks exchange at a start and at a save", list(_exchanges()))
    samples = 20_000 if run.quick else 220_000_000
    title = f"Data of a start: {DATASETS} datasets, {samples:,} samples, {READERS} reading ranks"
    yield Table(title, list(_data(samples)))


def _exchanges() -> Iterator[Row]:
    manifest = make_manifest()
    parts = [_part(manifest, rank) for rank in range(RANKS)]
    names = [{tensor.key for tensor in part} for part in parts]
    yield _row("manifest, to all", [manifest] + [None] * (RANKS - 1), _broadcast)
    yield _row("names of tensors, to the first", names, _gathered)
    yield _row("what each has written, to the first", parts, _gathered)
    yield _row("that all is well", [None] * RANKS, _agreed)


def _row(
    what: str, values: Sequence[object], after: Callable[[Sequence[int]], tuple[int, int]]
) -> Row:
    # An outcome was a result and an error.
    before = max(len(pickle.dumps((value, None))) for value in values) * RANKS
    first, other = after([len(pickle.dumps(value)) for value in values])
    return {
        "what": what,
        "before, MiB in each rank": before / MIB,
        "after, MiB in the first": first / MIB,
        "after, MiB in each other": other / MIB,
    }


def _agreed(sizes: Sequence[int]) -> tuple[int, int]:
    return _NUMBER, _NUMBER


def _broadcast(sizes: Sequence[int]) -> tuple[int, int]:
    each = 2 * _NUMBER + sizes[0]
    return each, each


def _gathered(sizes: Sequence[int]) -> tuple[int, int]:
    # With each value go the number of its parts and their sizes.
    return _NUMBER + sum(size + 2 * _NUMBER for size in sizes[1:]), _NUMBER


def make_manifest() -> Manifest:
    """A manifest as large as that of BLOOM 176B: each tensor cut by tensor and data ranks."""
    tensors = []
    for layer in range(LAYERS):
        place = layer * PIPELINE // LAYERS
        for number in range(LAYER_TENSORS):
            name = f"language_model.transformer.layers.{layer}.attention.tensor_{number}.weight"
            files = [f"rank-{rank:05d}.safetensors" for rank in _holders(place, number)]
            tensors += [_stored(kind, name, files) for kind in KINDS]
    stored = {f"rank-{rank:05d}.safetensors": StoredFile(2**32, "0" * 64) for rank in range(RANKS)}
    return Manifest({"step": 1}, {}, {}, tuple(tensors), stored)


def _holders(place: int, number: int) -> list[int]:
    """The ranks that hold a tensor: those of the tensor group, of one or two data ranks."""
    first = place * DATA * TENSOR
    data = {number % DATA, (number + 1) % DATA}
    return [first + rank * TENSOR + tensor for rank in sorted(data) for tensor in range(TENSOR)]


def _stored(kind: str, name: str, files: Sequence[str]) -> StoredTensor:
    boxes = tuple(
        StoredBox(file, f"{kind}/{name}/0", (0, 14336 * at), (14336, 14336))
        for at, file in enumerate(files)
    )
    return StoredTensor(kind, name, (14336, 14336 * len(files)), "float32", boxes)


def _part(manifest: Manifest, rank: int) -> list[StoredTensor]:
    """What one rank has written: the tensors, each with the boxes of this rank only."""
    file = f"rank-{rank:05d}.safetensors"
    own = ((t, tuple(box for box in t.boxes if box.file == file)) for t in manifest.tensors)
    return [replace(tensor, boxes=boxes) for tensor, boxes in own if boxes]


def _data(samples: int) -> Iterator[Row]:
    weights = (np.random.default_rng(0).random(DATASETS) ** 3).tolist()
    tenth = max(1, samples // 10)
    before = _seconds(lambda: former_blend(weights, tenth))
    with TemporaryDirectory() as name:
        folder, caches = Path(name), [ArrayCache() for _ in range(2)]

        def start(cache: ArrayCache) -> BlendedSamples:
            return BlendedSamples([], weights, samples, cache, folder)

        after = _seconds(lambda: start(caches[0]))
        verified = _seconds(lambda: start(caches[1]))
        opened = _seconds(lambda: start(caches[1]))
        size = sum(path.stat().st_size for path in folder.iterdir())
    yield _work("blend computed, CPU s", 10 * before, READERS, after, 1)
    yield _work("kept blend verified, CPU s", None, None, verified, NODES)
    yield _work("verified blend opened, CPU s", None, None, opened, READERS - NODES)
    yield _work("blend in private memory, MiB", size / MIB, READERS, 0.0, READERS)
    yield _work("tokens read, TB, nodes with disks of their own", *_read(NODES))
    yield _work("tokens read, TB, one shared disk", *_read(1))


def _read(disks: int) -> tuple[float, int, float, int]:
    """Each token file: by every rank before, once a disk after."""
    return TOKENS_BYTES / 1e12, READERS, TOKENS_BYTES / 1e12, disks


def _work(
    what: str, before: float | None, by: int | None, after: float, after_by: int
) -> dict[str, Any]:
    return {
        "what": what,
        "before": before,
        "times before": by,
        "after": after,
        "times after": after_by,
    }


def _seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def former_blend(weights: Sequence[float], num_samples: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """``blend`` as it was: fewer and longer runs, all side by side in one thread."""
    shares = np.array(weights, dtype=np.float64)
    shares /= shares.sum()
    length = max(1, math.isqrt(num_samples), -(-num_samples // 2048))
    starts = np.arange(0, max(1, num_samples), length)
    choices = np.empty((length, len(starts)), np.min_scalar_type(len(shares)))
    taken = np.empty((length, len(starts)), np.min_scalar_type(num_samples))
    exact = starts[:, None] * shares
    counts = np.floor(exact).astype(np.int64)
    losses = np.argsort(np.argsort(counts - exact, axis=1, kind="stable"), axis=1)
    counts += losses < (starts - counts.sum(axis=1))[:, None]
    ends = np.empty_like(counts)
    runs = np.arange(len(starts))
    while len(runs) > 0:
        first, reached, rows = starts[runs], counts[runs], np.arange(len(runs))
        for step in range(length):
            behind = shares * np.maximum(first + step, 1)[:, None] - reached
            choice = behind.argmax(axis=1)
            choices[step, runs] = choice
            taken[step, runs] = reached[rows, choice]
            reached[rows, choice] += 1
        ends[runs] = reached
        runs = 1 + np.flatnonzero((ends[:-1] != counts[1:]).any(axis=1))
        counts[runs] = ends[runs - 1]
    return choices.T.reshape(-1)[:num_samples], taken.T.reshape(-1)[:num_samples]


if __name__ == "__main__":
    run_tool(main)
