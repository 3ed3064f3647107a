"""Draw the curves of a run and write them, with a summary, as one PNG and one HTML page.

Reads ``metrics.jsonl`` of the run folder, described in ``megatron/training/metrics.py``. The page
holds its picture and refers to nothing outside.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, TypeAlias

import matplotlib
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from megatron.atomic import atomic_writes
from megatron.errors import DataError, DiskError
from megatron.report.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, STYLE
from megatron.training.metrics import METRICS_FILE, Record, duration, read_metrics, short_number
from megatron.training.run_folder import check_run_folder

Floats: TypeAlias = NDArray[np.float64]

RESUME: dict[str, Any] = {"color": PURPLE, "lw": 1.2, "ls": "--", "zorder": 1}

PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Run:
    """The records of a run; there is at least one step."""

    name: str
    steps: list[Record]
    evals: list[Record]
    starts: list[Record]

    def column(self, field: str) -> Floats:
        """Field ``field`` of every step; what is null is NaN."""
        return _column(self.steps, field)

    def evaluations(self) -> dict[str, list[Record]]:
        """The evaluations of each split, under the name to show."""
        names = [("valid", "Validation"), ("test", "Test")]
        splits = {name: [e for e in self.evals if e.get("split") == key] for key, name in names}
        return {name: records for name, records in splits.items() if records}

    @property
    def info(self) -> Record:
        """What the newest start told of the run."""
        return self.starts[-1] if self.starts else {}

    @property
    def resumes(self) -> list[int]:
        """The steps after which the run went on from a checkpoint."""
        return [start["step"] for start in self.starts[1:]]

    @property
    def final_steps(self) -> int:
        """How many of the last steps the final loss is the mean of."""
        return max(1, len(self.steps) // 50)

    @property
    def final_loss(self) -> float:
        """The mean of the finite losses of the last ``final_steps``; NaN if there are none."""
        loss = self.column("loss")[-self.final_steps :]
        finite = loss[np.isfinite(loss)]
        return float(finite.mean()) if finite.size else np.nan

    @property
    def loss_scale(self) -> Floats:
        """That of every step, NaN where there was none: but under fp16, and in older runs."""
        return _column([{"loss_scale": None, **step} for step in self.steps], "loss_scale")

    @property
    def has_loss_scale(self) -> bool:
        """Whether the run has ended under fp16."""
        return bool(np.isfinite(self.loss_scale[-1]))

    @property
    def seconds(self) -> float:
        """Time spent on the steps, over all starts."""
        last_of_start = np.isin(self.column("step"), self.resumes)
        last_of_start[-1] = True
        return float(self.column("elapsed_seconds")[last_of_start].sum())


def load_run(folder: Path) -> Run:
    """Read the metrics of the run in ``folder``.

    Raises:
        DataError: if there are none, or they are damaged.
    """
    check_run_folder(folder)
    path = folder / METRICS_FILE
    records = read_metrics(path)
    kinds = {kind: [r for r in records if r["event"] == kind] for kind in ("step", "eval", "start")}
    if not kinds["step"]:
        raise DataError(f"{path}: must hold at least one finished step, found none")
    return Run(
        name=folder.resolve().name,
        steps=kinds["step"],
        evals=kinds["eval"],
        starts=kinds["start"],
    )


def _column(records: Sequence[Record], field: str) -> Floats:
    try:
        values = [record[field] for record in records]
        return np.array([np.nan if v is None else float(v) for v in values])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{METRICS_FILE}: every {records[0]['event']} needs a number {field}"
        ) from error


def smooth(values: Floats, reach: int) -> Floats:
    """The mean of the finite values at most ``reach`` steps away, NaN where there are none."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    counted = count[high] - count[low]
    return np.where(counted > 0, (total[high] - total[low]) / np.maximum(counted, 1), np.nan)


def summarize(run: Run) -> list[tuple[str, str]]:
    """Names and values of what there is to tell in numbers."""
    rows = [(f"Training loss, mean of last {run.final_steps} steps", f"{run.final_loss:.4f}")]
    for name, records in run.evaluations().items():
        rows += _evaluation_rows(name, records[-1])
    rows += [
        ("Steps", f"{run.steps[-1]['step']:,}"),
        ("Samples", f"{run.column('consumed_samples')[-1]:,.0f}"),
        ("Tokens", f"{run.column('consumed_tokens')[-1]:,.0f}"),
        ("Duration", duration(run.seconds)),
        ("Resumes", str(len(run.resumes))),
        ("Skipped updates", f"{run.column('skipped').sum():.0f}"),
        *([("Loss scale, last", f"{run.loss_scale[-1]:g}")] if run.has_loss_scale else []),
        ("Tokens/s, median", short_number(_median(run, "tokens_per_second"))),
        ("TFLOP/s per device, median", short_number(_median(run, "tflops_per_device"))),
        ("MFU, median", _mfu(run)),
        ("Peak memory", f"{run.column('peak_memory_bytes').max() / 2**30:.2f} GiB"),
    ]
    if run.starts:
        rows.append(("Started", str(run.starts[0].get("time"))))
    told = {"event", "step", "time", "config"}
    rows += [(_label(key), _text(value)) for key, value in run.info.items() if key not in told]
    return rows


def _evaluation_rows(name: str, record: Record) -> list[tuple[str, str]]:
    labels = {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
    return [
        (f"{name} {label}", f"{_column([record], field)[0]:.4f}")
        for field, label in labels.items()
        if record.get(field) is not None
    ]


def _median(run: Run, field: str) -> float:
    return float(np.median(run.column(field)))


def _mfu(run: Run) -> str:
    known = run.column("mfu")
    known = known[np.isfinite(known)]
    return f"{np.median(known):.1%}" if known.size else "n/a"


def _label(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return f"{value:,}" if type(value) is int else str(value)


def draw(run: Run) -> Figure:
    """Four panels over the steps; the tokens seen stand on top."""
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
        figure = Figure(figsize=(13, 8.2), layout=layout)
        figure.suptitle(run.name, x=0.012, ha="left", size=16, weight="bold", parse_math=False)
        figure.text(0.988, 0.975, _subtitle(run), ha="right", va="top", size=11, color=GREY)
        (loss, learning_rate), (grad_norm, throughput) = figure.subplots(2, 2)
        _draw_loss(loss, run)
        _draw_learning_rate(learning_rate, run)
        _draw_grad_norm(grad_norm, run)
        _draw_throughput(throughput, run)
        for axes in (loss, learning_rate, grad_norm, throughput):
            _finish_steps(axes, run)
        for axes in (loss, learning_rate):
            _add_tokens(axes, run)
        for axes, corner in (
            (loss, "upper right"),
            (grad_norm, "upper right"),
            (throughput, "lower right"),
        ):
            axes.legend(loc=corner)
    return figure


def _draw_loss(axes: Axes, run: Run) -> None:
    axes.set_title("Loss (nats per token)")
    loss = run.column("loss")
    label = f"training, final {run.final_loss:.3f}"
    _draw_smoothed(axes, run, loss, smooth(loss, _reach(run)), label)
    for (name, records), color in zip(run.evaluations().items(), (ORANGE, GREEN), strict=False):
        losses = _column(records, "loss")
        label = f"{name.lower()}, final {losses[-1]:.3f}"
        axes.plot(_column(records, "step"), losses, "o-", ms=4, lw=1.2, color=color, label=label)
    # The first steps fall from ln(vocabulary); the rest is what there is to see.
    rest = loss[_reach(run) :]
    if np.isfinite(rest).any():
        low, high = axes.get_ylim()
        axes.set_ylim(low, min(high, rest[np.isfinite(rest)].max() + 0.3))
    if run.resumes:
        axes.plot([], label="resumed", **RESUME)


def _draw_learning_rate(axes: Axes, run: Run) -> None:
    axes.set_title("Learning rate")
    axes.plot(run.column("step"), run.column("learning_rate"), color=BLUE, lw=1.8, **_dot(run))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))
    axes.set_ylim(bottom=0)
    if run.has_loss_scale:
        right = axes.twinx()
        right.plot(run.column("step"), run.loss_scale, color=GREEN, lw=1.2, **_dot(run))
        right.set_yscale("log", base=2)
        right.set_ylabel("loss scale", color=GREEN)


def _draw_grad_norm(axes: Axes, run: Run) -> None:
    axes.set_title("Gradient norm before clipping")
    norm = run.column("grad_norm")
    # The mean of the logarithm, which single spikes hardly move.
    with np.errstate(divide="ignore"):
        smoothed = np.exp(smooth(np.log(norm), _reach(run)))
    _draw_smoothed(axes, run, norm, smoothed, "gradient norm")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    skipped = run.column("step")[run.column("skipped") > 0]
    if skipped.size:
        rug: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "color": ORANGE, "ms": 5}
        axes.plot(skipped, np.full(skipped.shape, 0.025), "^", label="skipped update", **rug)


def _draw_throughput(axes: Axes, run: Run) -> None:
    axes.set_title("Throughput (tokens per second)")
    speed, median = run.column("tokens_per_second"), _median(run, "tokens_per_second")
    axes.plot(run.column("step"), speed, color=BLUE, lw=1, alpha=0.6, **_dot(run))
    axes.axhline(median, color=INK, lw=1.2, ls=":", label=f"median {short_number(median)}")
    axes.set_ylim(0, 1.15 * speed.max())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def _draw_smoothed(axes: Axes, run: Run, values: Floats, smoothed: Floats, label: str) -> None:
    steps = run.column("step")
    axes.plot(steps, values, color=BLUE, lw=0.8, alpha=0.3)
    axes.plot(steps, smoothed, color=BLUE, lw=1.8, label=label, **_dot(run))


def _reach(run: Run) -> int:
    """Smooth over a fiftieth of the run, a hundredth on each side."""
    return len(run.steps) // 100


def _dot(run: Run) -> dict[str, Any]:
    """A single step makes no line, so it gets a dot."""
    return {"marker": "o"} if len(run.steps) == 1 else {}


def _finish_steps(axes: Axes, run: Run) -> None:
    steps = run.column("step")
    begin, end = steps[0] - 1, steps[-1]
    axes.set_xlim(begin, end + 0.015 * (end - begin))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    for step in run.resumes:
        axes.axvline(step, **RESUME)


def _add_tokens(axes: Axes, run: Run) -> None:
    """Mark round numbers of tokens on top, at the steps that saw them; the batch may have grown."""
    steps, tokens = run.column("step"), run.column("consumed_tokens")
    ticks = MaxNLocator(6).tick_values(tokens[0], tokens[-1])
    ticks = ticks[(ticks >= tokens[0]) & (ticks <= tokens[-1])]
    top = axes.secondary_xaxis("top")
    top.set_xticks(np.interp(ticks, tokens, steps), [short_number(tick) for tick in ticks])
    top.set_xlabel("tokens")


def render_page(run: Run, picture: bytes) -> str:
    """The HTML page; everything that the run told is escaped."""
    rows = summarize(run)
    config = run.info.get("config")
    return Template(PAGE.read_text("utf-8")).substitute(
        name=html.escape(run.name),
        picture=base64.b64encode(picture).decode("ascii"),
        rows="\n".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
            for name, value in rows
        ),
        config="" if config is None else _details(config),
    )


def _subtitle(run: Run) -> str:
    tokens = short_number(run.column("consumed_tokens")[-1])
    return f"{run.steps[-1]['step']:,} steps, {tokens} tokens, {duration(run.seconds)}"


def _details(config: Any) -> str:
    text = yaml.safe_dump(config, sort_keys=False)
    return f"<details><summary>Configuration</summary><pre>{html.escape(text)}</pre></details>"


def write_report(run: Run, folder: Path) -> list[Path]:
    """Write ``report.png`` and ``report.html`` into ``folder`` and return their paths.

    Raises:
        DiskError: if they cannot be written.
    """
    buffer = io.BytesIO()
    draw(run).savefig(buffer, format="png", dpi=150)
    contents = {
        "report.png": buffer.getvalue(),
        "report.html": render_page(run, buffer.getvalue()).encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{folder}: cannot be written: {error.strerror}") from error
    paths = [folder / name for name in contents]
    with atomic_writes(*paths) as files:
        for path in paths:
            files[path].write(contents[path.name])
    return paths
