"""The curves of runs, as the picture and the page draw them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from megatron.report.runs import Floats, Run, column
from megatron.report.style import BLUE, GREEN, ORANGE, PURPLE

Look: TypeAlias = Literal["line", "faint", "dots", "marks", "resumes"]
"""Dots are joined by a thin line. Marks stand at the lower edge, and resumes from edge to edge,
whatever their values."""

COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000")
"""Those of the runs, in their order; Okabe and Ito's."""


@dataclass(frozen=True)
class Curve:
    """Values over steps."""

    label: str
    color: str
    look: Look
    x: Floats
    y: Floats


@dataclass(frozen=True)
class Panel:
    """Curves over one axis.

    Attributes:
        log: whether the axis is logarithmic.
        floor: where the axis begins; None leaves that to the values.
        cap: where it ends at most.
    """

    title: str
    log: bool = False
    floor: float | None = None
    cap: float | None = None
    curves: list[Curve] = field(default_factory=list)


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """Loss, learning rate, gradient norm and throughput over the steps; under fp16, the scale."""
    panels = {
        "loss": Panel("Loss (nats per token)", cap=max(map(_cap, runs))),
        "learning_rate": Panel("Learning rate", floor=0.0),
        "grad_norm": Panel("Gradient norm before clipping", log=True),
        "tokens_per_second": Panel("Throughput (tokens per second)", floor=0.0),
        "loss_scale": Panel("Loss scale", log=True),
    }
    for index, run in enumerate(runs):
        alone = len(runs) == 1
        name, prefix = ("training", "") if alone else (run.name, f"{run.name}, ")
        color, steps = COLORS[index % len(COLORS)], run.column("step")
        for key in ("loss", "grad_norm", "tokens_per_second"):
            panels[key].curves.extend(_smoothed(run, key, name, color))
        for key, values in (
            ("learning_rate", run.column("learning_rate")),
            ("loss_scale", run.loss_scale),
        ):
            if np.isfinite(values).any():
                panels[key].curves.append(Curve(name, color, "line", steps, values))
        for order, (split, records) in enumerate(run.evaluations().items(), start=1):
            points = column(records, "step"), column(records, "loss")
            own = COLORS[order] if alone else color
            panels["loss"].curves.append(Curve(f"{prefix}{split}", own, "dots", *points))
        skipped = steps[run.column("skipped") > 0]
        own = ORANGE if alone else color
        _mark(panels["grad_norm"], f"{prefix}skipped update", own, "marks", skipped)
        own, resumed = PURPLE if alone else color, np.array(run.resumes, dtype=np.float64)
        for panel in panels.values():
            _mark(panel, f"{prefix}resumed", own, "resumes", resumed)
    return [panel for key, panel in panels.items() if key != "loss_scale" or _has_line(panel)]


def _has_line(panel: Panel) -> bool:
    return any(curve.look == "line" for curve in panel.curves)


def _mark(panel: Panel, label: str, color: str, look: Look, steps: Floats) -> None:
    if steps.size:
        panel.curves.append(Curve(label, color, look, steps, np.full(steps.shape, np.nan)))


def _smoothed(run: Run, key: str, name: str, color: str) -> list[Curve]:
    """The values of each step, and their mean over a fiftieth of the run where that is more."""
    steps, values, reach = run.column("step"), run.column(key), _reach(run)
    if reach == 0:
        return [Curve(name, color, "line", steps, values)]
    if key == "grad_norm":
        # The mean of the logarithm, which single spikes hardly move.
        with np.errstate(divide="ignore", invalid="ignore"):
            means = np.exp(smooth(np.log(values), reach))
    else:
        means = smooth(values, reach)
    return [
        Curve(f"{name}, each step", color, "faint", steps, values),
        Curve(name, color, "line", steps, means),
    ]


def _reach(run: Run) -> int:
    """Smooth over a fiftieth of the run, a hundredth on each side."""
    return len(run.steps) // 100


def _cap(run: Run) -> float:
    """The loss falls from ln(vocabulary) in the first steps; the rest is what there is to see."""
    rest = run.column("loss")[_reach(run) :]
    rest = rest[np.isfinite(rest)]
    return float(rest.max()) + 0.3 if rest.size else np.inf


def smooth(values: Floats, reach: int) -> Floats:
    """The mean of the finite values at most ``reach`` steps away, NaN where there are none."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    counted = count[high] - count[low]
    return np.where(counted > 0, (total[high] - total[low]) / np.maximum(counted, 1), np.nan)
