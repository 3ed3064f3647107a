"""The page about runs: curves to look into, and tables beside each other."""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import jinja2
import numpy as np
import yaml

from megatron.atomic import atomic_writes, make_folder
from megatron.config import Config
from megatron.config.dotted import flatten
from megatron.report.panels import Curve, panels_of
from megatron.report.picture import draw
from megatron.report.runs import FINAL_STEPS, Floats, Run, Start, column
from megatron.training.metrics import Record, duration, short_number

STRETCHES = 1500
"""Of a longer curve the page holds the lowest and the highest value of each of so many."""

_OF_STARTS = ("event", "step", "time", "config", "layout", "world_size", "device")


def write_report(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write ``report.png`` and ``report.html`` into ``folder`` and return their paths.

    Raises:
        DiskError: if they cannot be written.
    """
    buffer = io.BytesIO()
    draw(runs).savefig(buffer, format="png", dpi=150)
    make_folder(folder)
    paths = [folder / "report.png", folder / "report.html"]
    contents = (buffer.getvalue(), render_page(runs, buffer.getvalue()).encode("utf-8", "replace"))
    with atomic_writes(*paths) as files:
        for path, content in zip(paths, contents, strict=True):
            files[path].write(content)
    return paths


def render_page(runs: Sequence[Run], picture: bytes) -> str:
    """The HTML page; everything that the runs told is escaped."""
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html")
    summaries = [summarize(run) for run in runs]
    labels = dict.fromkeys(label for summary in summaries for label in summary)
    return template.render(
        names=[run.name for run in runs],
        picture=base64.b64encode(picture).decode("ascii"),
        curves=_curves(runs),
        summary=[(label, [summary.get(label, "") for summary in summaries]) for label in labels],
        starts=[row for run in runs for row in describe_starts(run)],
        options=list(changed_options(runs)),
        configs=[
            (run.name, yaml.safe_dump(run.newest.told["config"], sort_keys=False))
            for run in runs
            if "config" in run.newest.told
        ],
    )


def summarize(run: Run) -> dict[str, str]:
    """Names and values of what there is to tell in numbers."""
    scale, known_mfu = run.loss_scale[-1], run.column("mfu")
    known_mfu = known_mfu[np.isfinite(known_mfu)]
    rows = {f"Training loss, mean of last {FINAL_STEPS} steps": f"{run.final_loss:.4f}"}
    for name, records in run.evaluations().items():
        rows |= _evaluation_rows(name.capitalize(), records[-1])
    rows |= {
        "Steps": f"{run.steps[-1]['step']:,}",
        "Samples": f"{run.column('consumed_samples')[-1]:,.0f}",
        "Tokens": f"{run.column('consumed_tokens')[-1]:,.0f}",
        "Duration": duration(run.seconds),
        "Resumes": str(len(run.resumes)),
        "Skipped updates": f"{run.column('skipped').sum():.0f}",
        **({"Loss scale, last": f"{scale:g}"} if np.isfinite(scale) else {}),
        "Tokens/s, median": short_number(_median(run.steps, "tokens_per_second")),
        "TFLOP/s per device, median": short_number(_median(run.steps, "tflops_per_device")),
        "MFU, median": f"{np.median(known_mfu):.1%}" if known_mfu.size else "n/a",
        "Peak memory": f"{run.column('peak_memory_bytes').max() / 2**30:.2f} GiB",
    }
    told = run.newest.told.items()
    others = {key.replace("_", " ").capitalize(): v for key, v in told if key not in _OF_STARTS}
    return rows | {
        label: f"{value:,}" if type(value) is int else _text(value)
        for label, value in others.items()
    }


def _evaluation_rows(name: str, record: Record) -> dict[str, str]:
    labels = {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
    return {
        f"{name} {label}": f"{column([record], field)[0]:.4f}"
        for field, label in labels.items()
        if record.get(field) is not None
    }


def _median(steps: Sequence[Record], field: str) -> float:
    return float(np.median(column(steps, field)))


def describe_starts(run: Run) -> list[dict[str, str]]:
    """A row for each start: what it ran on, which steps it made, what was not as before."""
    rows = []
    for before, start in zip([run.starts[0], *run.starts], run.starts, strict=False):
        steps, told = start.steps, start.told
        rows.append(
            {
                "Run": run.name,
                "Started": _text(told.get("time", "")),
                "Steps": f"{steps[0]['step']:,} to {steps[-1]['step']:,}" if steps else "none",
                "Layout": _text(told.get("layout", "")),
                "World size": _text(told.get("world_size", "")),
                "Engine": _text(start.options.get("engine.name", "")),
                "Device": _text(told.get("device", "")),
                "Tokens/s, median": _speed(start),
                "Changed options": _changes(before, start),
            }
        )
    return rows


def _speed(start: Start) -> str:
    return short_number(_median(start.steps, "tokens_per_second")) if start.steps else ""


def _changes(before: Start, start: Start) -> str:
    """The options that ``start`` has other than the start before it."""
    old, new = before.options, start.options
    return ", ".join(
        f"{name} {_text(old.get(name))} \N{RIGHTWARDS ARROW} {_text(new.get(name))}"
        for name in old | new
        if old.get(name) != new.get(name)
    )


@dataclass(frozen=True)
class Option:
    """An option that is not at its default in one of the runs, or has none.

    Attributes:
        told: its value in each run.
    """

    name: str
    default: str
    told: list[str]

    @property
    def differs(self) -> bool:
        """Whether the runs do not agree."""
        return len(set(self.told)) > 1


def changed_options(runs: Sequence[Run]) -> Iterator[Option]:
    """The options that are not at their defaults, as the newest starts had them."""
    defaults = {name: _text(value) for name, value in flatten(_defaults(Config))}
    told = [{name: _text(value) for name, value in run.newest.options.items()} for run in runs]
    for name in dict.fromkeys(name for options in told for name in options):
        default = defaults.get(name, "")
        values = [options.get(name, "") for options in told]
        if set(values) != {default}:
            yield Option(name, default, values)


def _defaults(config: type) -> dict[str, Any]:
    """The options of the dataclass ``config`` that have a default, as a run tells them."""
    hints, values = get_type_hints(config), {}
    for field in fields(config):
        if is_dataclass(hints[field.name]):
            values[field.name] = _defaults(hints[field.name])
        elif field.default is not MISSING:
            values[field.name] = field.default
        elif field.default_factory is not MISSING:
            values[field.name] = field.default_factory()
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return "; ".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _curves(runs: Sequence[Run]) -> dict[str, Any]:
    """What the script of the page draws."""
    ends = [step["step"] for run in runs for step in (run.steps[0], run.steps[-1])]
    panels = [
        {
            "title": panel.title,
            "log": panel.log,
            "floor": panel.floor,
            "cap": None if panel.cap is None else _number(panel.cap),
            "curves": [_points(curve) for curve in panel.curves],
        }
        for panel in panels_of(runs)
    ]
    return {"range": [min(ends) - 1, max(ends)], "panels": panels}


def _points(curve: Curve) -> dict[str, Any]:
    x, y = (list(map(_number, values)) for values in thin(curve.x, curve.y))
    return {"label": curve.label, "color": curve.color, "look": curve.look, "x": x, "y": y}


def _number(value: float) -> float | None:
    """``value`` as JSON has it, without digits that nobody sees."""
    return float(f"{value:.8g}") if np.isfinite(value) else None


def thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Of a long curve the lowest and the highest value in each stretch, so that no peak is lost."""
    if len(y) <= 2 * STRETCHES:
        return x, y
    kept: set[int] = set()
    for low, high in pairwise(np.linspace(0, len(y), STRETCHES + 1).astype(int)):
        stretch = y[low:high]
        kept.add(low + int(np.where(np.isnan(stretch), np.inf, stretch).argmin()))
        kept.add(low + int(np.where(np.isnan(stretch), -np.inf, stretch).argmax()))
    index = sorted(kept)
    return x[index], y[index]
