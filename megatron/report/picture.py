"""The picture of the curves of runs."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from megatron.report.panels import Curve, Panel, panels_of
from megatron.report.runs import Run
from megatron.report.style import GREY, STYLE
from megatron.training.metrics import duration, short_number

LOOKS: dict[str, dict[str, Any]] = {
    "line": {"lw": 1.6},
    "faint": {"lw": 0.8, "alpha": 0.3},
    "dots": {"lw": 1.2, "ls": ":", "marker": "o", "ms": 4},
    "marks": {"lw": 0, "marker": "^", "ms": 5},
    "resumes": {"lw": 1.2, "ls": "--", "zorder": 1},
}


def draw(runs: Sequence[Run]) -> Figure:
    """A panel for each thing to see over the steps. The legend stands below all of them."""
    panels = panels_of(runs)
    rows = (len(panels) + 1) // 2
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
        figure = Figure(figsize=(13, 0.6 + 3.8 * rows), layout=layout)
        title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
        figure.suptitle(title, x=0.012, ha="left", size=16, weight="bold", parse_math=False)
        if len(runs) == 1:
            about = _about(runs[0])
            figure.text(0.988, 0.975, about, ha="right", va="top", size=11, color=GREY)
        grid = figure.subplots(rows, 2, squeeze=False).flat
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, panel)
            _number_steps(axes, runs)
        for axes in list(grid)[len(panels) :]:
            axes.remove()
        if len(runs) == 1:
            for axes in figure.axes[:2]:
                _add_tokens(axes, runs[0])
        curves = [curve for panel in panels for curve in panel.curves]
        # Beside several runs, the pale lines need no words.
        told = {curve.label for curve in curves if len(runs) == 1 or curve.look != "faint"}
        _add_legend(figure, told)
    return figure


def _about(run: Run) -> str:
    tokens = short_number(run.column("consumed_tokens")[-1])
    return (
        f"{run.steps[-1]['step']:,} steps, {tokens} tokens, {duration(run.seconds)}, "
        f"loss {run.final_loss:.3f}"
    )


def _draw_panel(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    for curve in panel.curves:
        _draw_curve(axes, curve)
    if panel.floor is not None:
        axes.set_ylim(bottom=panel.floor)
    if panel.cap is not None:
        axes.set_ylim(top=min(axes.get_ylim()[1], panel.cap))
    low, high = axes.get_ylim()
    if panel.log and high < 10 * low:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def _draw_curve(axes: Axes, curve: Curve) -> None:
    look = {"color": curve.color, **LOOKS[curve.look]}
    if curve.look == "resumes":
        for step in curve.x:
            axes.axvline(step, label=curve.label, **look)
    elif curve.look == "marks":
        place = axes.get_xaxis_transform()
        axes.plot(
            curve.x, np.full(curve.x.shape, 0.025), label=curve.label, transform=place, **look
        )
    else:
        # A single step makes no line, so it gets a dot.
        dot = {"marker": "o"} if len(curve.x) == 1 else {}
        axes.plot(curve.x, curve.y, label=curve.label, **dot | look)


def _number_steps(axes: Axes, runs: Sequence[Run]) -> None:
    begin = min(run.steps[0]["step"] for run in runs) - 1
    end = max(run.steps[-1]["step"] for run in runs)
    axes.set_xlim(begin, end + 0.015 * (end - begin))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _add_tokens(axes: Axes, run: Run) -> None:
    """Mark round numbers of tokens on top, at the steps that saw them; the batch may have grown."""
    steps, tokens = run.column("step"), run.column("consumed_tokens")
    ticks = MaxNLocator(6).tick_values(tokens[0], tokens[-1])
    ticks = ticks[(ticks >= tokens[0]) & (ticks <= tokens[-1])]
    top = axes.secondary_xaxis("top")
    top.set_xticks(np.interp(ticks, tokens, steps), [short_number(tick) for tick in ticks])
    top.set_xlabel("tokens")


def _add_legend(figure: Figure, told: set[str]) -> None:
    """A line for each of the curves ``told``, below the panels, where it hides none of them."""
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.lines}
    lines = {label: line for label, line in lines.items() if label in told}
    legend = figure.legend(
        lines.values(), map(str, range(len(lines))), loc="outside lower center", ncols=4
    )
    for text, label in zip(legend.get_texts(), lines, strict=True):
        # Names of runs are shown as they are, also with a $ in them.
        text.set_parse_math(False)
        text.set_text(label)
