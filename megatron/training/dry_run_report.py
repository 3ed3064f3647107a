"""The dry run on the command line: its flag, and what it found as text.

--dry_run         count
--dry_run 80      count, and see whether 80 GiB are enough for each rank
"""

import math
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.config import Config
from megatron.config.rules import require
from megatron.engine.schedules import ideal_idle_share, idle_share
from megatron.model.flops import flops_per_token
from megatron.optim.schedule import batch_plan
from megatron.planning.communication import sent_per_step
from megatron.training.dry_run import GIB, DryRun, RankCount

_BELOW = "E embedding, H head. What CUDA and NCCL take for themselves comes on top."

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
    """

    memory: float | None


def take_request(argv: Sequence[str]) -> tuple[DryRunRequest | None, list[str]]:
    """Take ``--dry_run [GIB]`` out of the arguments ``argv``, and return what is left.

    Raises:
        ConfigError: for a memory that is not a number above 0.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--dry_run", nargs="?", const="", default=None)
    found, options = parser.parse_known_args(argv)
    if not found.dry_run:
        return None if found.dry_run is None else DryRunRequest(None), options
    try:
        memory = float(found.dry_run)
    except ValueError:
        memory = 0.0
    require(
        0 < memory < math.inf,
        f"--dry_run must be followed by the GiB of a rank, above 0, or by nothing, "
        f"got '{found.dry_run}'",
    )
    return DryRunRequest(memory), options


def dry_run_report(found: DryRun, memory: float | None) -> str:
    """The run in a few lines, and a table of what the ranks of the pipeline hold.

    Args:
        memory: of each rank, in GiB, if the table is to say who fits.
    """
    lines = [f"{name:<10}{text}" for name, text in _facts(found)]
    headings = [*_HEADINGS, *([] if memory is None else ["fits"])]
    rows = [_row(place, rank, memory) for place, rank in enumerate(found.ranks)]
    lines += ["", "Memory in GiB, on the ranks of the pipeline:", ""]
    lines += _table([headings, *rows])
    lines += ["", _BELOW]
    return "\n".join(lines) + "\n"


def _facts(found: DryRun) -> Iterator[tuple[str, str]]:
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
    ideal = ideal_idle_share(parallel.schedule, dims.pipeline, parallel.chunks, found.microbatches)
    yield (
        "schedule",
        f"{parallel.schedule}, {found.microbatches} x {train.least_micro_batch_size} samples{auto} "
        f"on each data rank: {idle_share(found.plan):.2%} idle, in theory {ideal:.2%}",
    )
    sent = sent_per_step(config, dims)
    texts = [f"{axis} {size:,}" for axis, size in sent.items() if size > 0]
    yield "sent", f"{', '.join(texts) or 'no'} bytes a step, by the busiest rank of each axis"


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


def _row(place: int, rank: RankCount, memory: float | None) -> list[str]:
    state = rank.state
    sizes = (
        state.weights,
        state.gradients,
        state.optimizer,
        rank.activations,
        rank.working,
        rank.total,
    )
    fits = [] if memory is None else ["yes" if rank.total <= memory * GIB else "no"]
    texts = [f"{size / GIB:.2f}" for size in sizes]
    return [str(place), rank.layers, f"{rank.parameters:,}", *texts, *fits]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in rows
    ]
