"""The dry run on the command line: its flag, and what it found as text.

--dry_run                   count
--dry_run 80                count, and see whether 80 GiB are enough for each rank
--dry_run --cluster h100    count, see whether GPUs of that kind have room, and how long it takes
"""

import math
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron.config import Config
from megatron.config.rules import require
from megatron.engine.schedules import ideal_idle_share
from megatron.model.flops import flops_per_token
from megatron.optim.schedule import batch_plan
from megatron.planning.cluster import CLUSTERS, Cluster, cluster_of
from megatron.planning.communication import num_microbatches, sent_per_step
from megatron.planning.count import (
    GIB,
    USUAL_GPU_MEMORY,
    Count,
    RankCount,
    allowance,
    count,
)
from megatron.planning.forecast import forecast
from mpu import ParallelDims

_HEADINGS = (
    "rank",
    "layers",
    "parameters",
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "working",
    "total",
)


@dataclass(frozen=True)
class DryRunRequest:
    """That a dry run is wanted.

    Attributes:
        memory: of each rank, in GiB, if it is to be enough.
        cluster: kind of GPUs, if the time is to be predicted.
    """

    memory: float | None = None
    cluster: str | None = None


def take_request(argv: Sequence[str]) -> tuple[DryRunRequest | None, list[str]]:
    """Take ``--dry_run [GIB]``, and ``--cluster KIND`` with it, out of the arguments ``argv``.

    Returns:
        The request, if there is one, and what is left.

    Raises:
        ConfigError: for a memory that is not a number above 0, or a kind that nobody knows.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--dry_run", nargs="?", const="", default=None)
    found, options = parser.parse_known_args(argv)
    if found.dry_run is None:
        return None, options
    parser.add_argument("--cluster", nargs="?", const="", default=None)
    found, options = parser.parse_known_args(argv)
    require(
        found.cluster in (None, *CLUSTERS),
        f"--cluster must be one of {', '.join(sorted(CLUSTERS))}, got '{found.cluster}'",
    )
    if not found.dry_run:
        return DryRunRequest(None, found.cluster), options
    try:
        memory = float(found.dry_run)
    except ValueError:
        memory = 0.0
    require(
        0 < memory < math.inf,
        f"--dry_run must be followed by the GiB of a rank, above 0, or by nothing, "
        f"got '{found.dry_run}'",
    )
    return DryRunRequest(memory, found.cluster), options


def answer(config: Config, request: DryRunRequest, write: Callable[[str], object]) -> None:
    """Count, ``write`` the report, and see whether the memory is enough.

    Raises:
        ConfigError: if it is not, or the parts of the config do not fit each other.
    """
    memory, cluster = request.memory, None
    if request.cluster is not None:
        memory = memory or CLUSTERS[request.cluster].memory / GIB
    found = count(config, USUAL_GPU_MEMORY if memory is None else memory * GIB)
    if request.cluster is not None:
        cluster = cluster_of(request.cluster, found.dims.world_size)
    write(dry_run_report(found, memory, cluster))
    if memory is not None:
        found.check_fits(memory)


def dry_run_report(found: Count, memory: float | None, cluster: Cluster | None = None) -> str:
    """The run in a few lines, and a table of what the ranks of the pipeline hold.

    Args:
        memory: of each rank, in GiB, if the table is to say who fits.
        cluster: to say how long the run takes on it.
    """
    lines = [f"{name:<10}{text}" for name, text in _facts(found, cluster)]
    headings = [*_HEADINGS, *([] if memory is None else ["fits"])]
    beside = allowance(found.config)
    rows = [_row(place, rank, memory, beside) for place, rank in enumerate(found.ranks)]
    lines += ["", "Memory in GiB, on the ranks of the pipeline:", ""]
    lines += _table([headings, *rows])
    lines += ["", "E embedding, H head.", *allowance_lines(found.config)]
    return "\n".join(lines) + "\n"


def allowance_lines(config: Config) -> list[str]:
    """What has to fit beside all that is counted, as a line, if there is anything."""
    beside = allowance(config)
    if beside == 0:
        return []
    return [
        f"Allowance: {beside / GIB:g} GiB of each GPU for CUDA, NCCL and the gaps between tensors, "
        "which are not counted, have to fit too."
    ]


def idle_of(config: Config, dims: ParallelDims) -> float:
    """Share of a step that a rank waits for others by the schedule, with stages of equal work."""
    parallel, microbatches = config.parallel, num_microbatches(config, dims)
    return ideal_idle_share(parallel.schedule, dims.pipeline, parallel.chunks, microbatches)


def _facts(found: Count, cluster: Cluster | None) -> Iterator[tuple[str, str]]:
    config, dims = found.config, found.dims
    parallel = config.parallel
    yield "model", f"{found.parameters:,} parameters"
    data = f"data {dims.data}{' (parallel.data null)' if parallel.data is None else ''}"
    sequence = "on" if parallel.sequence else "off"
    yield (
        "layout",
        f"tensor {dims.tensor} x pipeline {dims.pipeline} x {data} = {dims.world_size} ranks, "
        f"ZeRO {parallel.zero}, sequence {sequence}, recompute {config.train.recompute}",
    )
    yield from _steps(config)
    train = config.train
    auto = " (the least of auto)" if train.micro_batch_size == "auto" else ""
    yield (
        "schedule",
        f"{parallel.schedule}, {found.microbatches} x {train.least_micro_batch_size} samples{auto} "
        f"on each data rank: {idle_of(config, dims):.2%} idle",
    )
    sent = sent_per_step(config, dims)
    texts = [f"{axis} {size:,}" for axis, size in sent.items() if size > 0]
    yield "sent", f"{', '.join(texts) or 'no'} bytes a step, by the busiest rank of each axis"
    if cluster is None:
        yield "time", f"with --cluster {', '.join(sorted(CLUSTERS))}"
    else:
        expected = forecast(config, dims, cluster)
        yield "time", str(expected)
        if dims.pipeline > 1:
            yield (
                "waits",
                f"{expected.step.bubble_share:.1%} of a step, with transfers and unequal stages",
            )


def _steps(config: Config) -> Iterator[tuple[str, str]]:
    train = config.train
    batches = list(batch_plan(train))
    grows = f", {batches[0]:,} in the first" if batches[0] != train.global_batch_size else ""
    tokens = train.global_batch_size * config.model.seq_length
    yield (
        "steps",
        f"{len(batches):,} of {train.global_batch_size:,} samples, {tokens:,} tokens{grows}",
    )
    causal, full = (tokens * flops_per_token(config.model, kind) for kind in ("causal", "full"))
    yield "compute", f"{causal:.4g} FLOPs a step with causal attention, {full:.4g} with full"


def _row(place: int, rank: RankCount, memory: float | None, beside: int) -> list[str]:
    state = rank.state
    sizes = (
        state.weights,
        state.gradients,
        state.optimizer,
        rank.activations,
        rank.working,
        rank.total,
    )
    fits = [] if memory is None else ["yes" if rank.total + beside <= memory * GIB else "no"]
    texts = [f"{size / GIB:.2f}" for size in sizes]
    return [str(place), rank.layers, f"{rank.parameters:,}", *texts, *fits]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in rows
    ]
