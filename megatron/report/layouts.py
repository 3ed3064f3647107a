"""The layouts that a search has found, as a table and as a picture."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from megatron.atomic import atomic_write, make_folder
from megatron.config import Config
from megatron.planning.cluster import GIB, Cluster
from megatron.planning.forecast import forecast, layout_options
from megatron.planning.report import allowance_lines, idle_of
from megatron.planning.search import Candidate, Found
from megatron.report.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, STYLE
from megatron.report.tables import Row, Table, table_lines
from mpu import ParallelDims

_COLORS = {"none": BLUE, "selective": GREEN, "full": ORANGE}
_LABELLED = 3
"""Rank grids whose best layout has its name in the plot."""


def draw(config: Config, cluster: Cluster, found: Found) -> Figure:
    """Every layout that fits: seconds of a step over the memory of its fullest rank."""
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
        figure = Figure(figsize=(10, 6), layout=layout)
        axes = figure.subplots()
        axes.set_title(
            f"Predicted seconds of a step on {cluster.gpus} GPUs, "
            "the best with tensor x pipeline x data"
        )
        for recompute, color in _COLORS.items():
            alike = [c for c in found.candidates if c.config.train.recompute == recompute]
            _scatter(axes, alike, label=f"recompute {recompute}", color=color, s=16, alpha=0.7)
        own = [c for c in found.candidates if c.is_layout_of(config)]
        _scatter(axes, own, label="the config's own", color=PURPLE, marker="*", s=180, zorder=4)
        for place, candidate in enumerate(_best_grids(found, _LABELLED), start=1):
            _label(axes, candidate, below=12 + 14 * place)
        axes.set_xlabel("GiB of the fullest rank")
        # Room for the names of the best.
        axes.set_ylim(bottom=0.72 * found.candidates[0].time.total)
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def _scatter(axes: Axes, candidates: Sequence[Candidate], **options: Any) -> None:
    if candidates:
        axes.scatter(*zip(*map(_point, candidates), strict=True), **options)


def _point(candidate: Candidate) -> tuple[float, float]:
    return candidate.count.fullest.total / GIB, candidate.time.total


def _label(axes: Axes, candidate: Candidate, below: int) -> None:
    """Write its rank grid as many points below a candidate."""
    dims = candidate.dims
    text = f"{dims.tensor} x {dims.pipeline} x {dims.data}"
    axes.annotate(
        text,
        _point(candidate),
        xytext=(0, -below),
        textcoords="offset points",
        ha="center",
        color=INK,
        arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.8},
    )


def _best_grids(found: Found, count: int) -> list[Candidate]:
    """The best layouts of ``count`` different rank grids."""
    best: dict[ParallelDims, Candidate] = {}
    for candidate in found.candidates:
        best.setdefault(candidate.dims, candidate)
    return list(best.values())[:count]


def layout_lines(config: Config, cluster: Cluster, found: Found, best: int) -> Iterator[str]:
    """What is printed."""
    yield (
        f"{len(found.candidates):,} layouts fit in {cluster.memory / GIB:.4g} GiB, "
        f"{found.num_too_large:,} do not. The best, by predicted time:"
    )
    ranked = list(enumerate(found.candidates, start=1))
    yield ""
    yield from table_lines(Table("", [_row(*one, cluster) for one in ranked[:best]]))
    yield from _details(found.candidates[0], cluster)
    own = [one for one in ranked if one[1].is_layout_of(config)]
    if own:
        yield "\nThe config's own:\n"
        yield from table_lines(Table("", [_row(*one, cluster) for one in own]))
        yield from _details(own[0][1], cluster)
    yield "\nGiB of the fullest rank, as a dry run counts them. Idle: of a step by the schedule;"
    yield "waits: the same with transfers, and with stages that are not equal."
    yield from allowance_lines(config)


def _details(candidate: Candidate, cluster: Cluster) -> Iterator[str]:
    yield f"\n    {forecast(candidate.config, candidate.dims, cluster)}"
    yield f"    {layout_options(candidate.config, candidate.dims)}"


def _row(place: int, candidate: Candidate, cluster: Cluster) -> Row:
    dims, config = candidate.dims, candidate.config
    parallel, train = config.parallel, config.train
    chunks = f" x {parallel.chunks}" if parallel.chunks > 1 else ""
    expected = forecast(config, dims, cluster)
    return {
        "": place,
        "tensor": dims.tensor,
        "pipeline": dims.pipeline,
        "data": dims.data,
        "micro-batch": train.micro_batch_size,
        "ZeRO": parallel.zero,
        "sequence": "yes" if parallel.sequence else "no",
        "recompute": train.recompute,
        "schedule": f"{parallel.schedule}{chunks}" if dims.pipeline > 1 else "-",
        "GiB": f"{_point(candidate)[0]:.2f}",
        "s a step": f"{expected.step.total:.4g}",
        "tokens/s/GPU": f"{expected.tokens_per_second / expected.gpus:,.0f}",
        "MFU": f"{expected.mfu:.1%}",
        "days": f"{expected.days:.3g}",
        "idle": f"{idle_of(config, dims):.2%}",
        "waits": f"{expected.step.bubble_share:.1%}",
    }


def write_plot(config: Config, cluster: Cluster, found: Found, path: Path) -> None:
    """Write what ``draw`` gives, as PNG.

    Raises:
        DiskError: if it cannot be written.
    """
    buffer = io.BytesIO()
    draw(config, cluster, found).savefig(buffer, format="png", dpi=150)
    make_folder(path.parent)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
