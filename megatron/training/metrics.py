"""What a run tells of its steps: ``metrics.jsonl``, TensorBoard and the log line.

``metrics.jsonl`` is strict JSON, one object a line, of four kinds:

    event   written                 fields, besides "event", "step" and "crc32"
    start   once a start            "time" (UTC), and what the caller tells of the run
    step    after each step         those of StepMetrics, and "loss_hex", "grad_norm_hex"
    eval    after each evaluation   those of EvalMetrics, and "perplexity"
    save    after each save         none

Numbers that JSON has no sign for are the strings "nan", "inf" and "-inf", which ``float`` reads.
The hexadecimal fields, made by ``float.hex``, compare two runs bit for bit.

``megatron/training/metrics_file.py`` knows about the lines, and what a start does with old ones.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, BinaryIO

from megatron.data.summary import DatasetSummary
from megatron.errors import ConfigError, DataError, DiskError
from megatron.training.metrics_file import Record as Record
from megatron.training.metrics_file import (
    begin_metrics,
    decode_lines,
    encode_record,
    survey,
    tell_damage,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"

_DATASETS = 8
"""Datasets that are told of one by one."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One step, or the mean of several (see ``Window``); counts are those after the step."""

    step: int
    consumed_samples: int
    consumed_tokens: int
    loss: float
    """Mean cross entropy of a token, in nats."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    global_batch_size: int
    skipped: bool
    """The weights were not updated."""
    loss_scale: float | None = None
    """What the loss was multiplied by; None but under fp16."""
    skipped_steps: int = 0
    """Of the run so far, over all starts."""
    step_seconds: float
    tokens_per_second: float
    """Of all devices together."""
    tflops_per_device: float
    """Model FLOPs, in 10^12 a second."""
    mfu: float | None
    """Share of the device's peak, 0 to 1; None where the peak is not known."""
    elapsed_seconds: float
    """Since this start of the run."""
    peak_memory_bytes: int
    """The most that one device, or one process on CPU, has held."""


@dataclass(frozen=True, kw_only=True)
class EvalMetrics:
    """One evaluation."""

    step: int
    consumed_samples: int
    split: str
    loss: float
    """Mean cross entropy of a token, in nats."""
    bits_per_byte: float | None
    """Of the text; None where the number of its bytes is not known."""

    @property
    def perplexity(self) -> float:
        """Choices out of which the model guesses: e^loss, infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


class Window:
    """The steps since the last log line."""

    def __init__(self) -> None:
        self._steps: list[StepMetrics] = []

    def add(self, metrics: StepMetrics) -> None:
        """Take in one more step."""
        self._steps.append(metrics)

    def summarize(self) -> StepMetrics:
        """The mean of the steps added since the last call, of which there has to be one.

        Loss and gradient norm are means over the steps that were not skipped, if there are any, and
        rates are means over time. Counts and the learning rate are those of the last step.
        """
        steps, self._steps = self._steps, []
        updates = [step for step in steps if not step.skipped] or steps
        times = list(map(attrgetter("step_seconds"), steps))

        def rate(field: str) -> float:
            return fmean(map(attrgetter(field), steps), times)

        return replace(
            steps[-1],
            loss=fmean(map(attrgetter("loss"), updates)),
            grad_norm=fmean(map(attrgetter("grad_norm"), updates)),
            skipped=any(map(attrgetter("skipped"), steps)),
            step_seconds=fmean(times),
            tokens_per_second=rate("tokens_per_second"),
            tflops_per_device=rate("tflops_per_device"),
            mfu=None if steps[-1].mfu is None else rate("mfu"),
            peak_memory_bytes=max(map(attrgetter("peak_memory_bytes"), steps)),
        )


def log_line(metrics: StepMetrics, *, total_steps: int, total_samples: int) -> str:
    """One line for people to read, with the time that the rest of the run will take."""
    m = metrics
    remaining = (total_samples - m.consumed_samples) * m.step_seconds / m.global_batch_size
    parts = [
        f"step {m.step:{len(str(total_steps))}}/{total_steps}",
        f"loss {m.loss:.4f}",
        f"lr {m.learning_rate:.2e}",
        f"norm {m.grad_norm:.3f}" + (" (skipped updates)" if m.skipped else ""),
        *([] if m.loss_scale is None else [f"scale {m.loss_scale:g} skipped {m.skipped_steps}"]),
        f"batch {m.global_batch_size}",
        f"{short_number(m.consumed_tokens)} tokens",
        f"{m.step_seconds:.3g} s/step {short_number(m.tokens_per_second)} tok/s",
        f"MFU {m.mfu:.1%}" if m.mfu is not None else f"{m.tflops_per_device:.3g} TFLOP/s MFU n/a",
        f"ETA {duration(remaining)}",
    ]
    return " | ".join(parts)


def eval_line(metrics: EvalMetrics) -> str:
    """One line for people to read about an evaluation."""
    line = (
        f"step {metrics.step} | {metrics.split} loss {metrics.loss:.4f} "
        f"perplexity {short_number(metrics.perplexity)}"
    )
    if metrics.bits_per_byte is not None:
        line += f" bits/byte {metrics.bits_per_byte:.4f}"
    return line


def duration(seconds: float) -> str:
    """``seconds``, at least 0, as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


def data_lines(summaries: Sequence[DatasetSummary]) -> Iterator[str]:
    """For people: all data, and what is read of each dataset, the most often read first."""
    if not summaries:
        return
    train = short_number(sum(it.train_tokens for it in summaries))
    valid = short_number(sum(it.valid_tokens for it in summaries))
    times = f", read {summaries[0].epochs:.3g} times" if len(summaries) == 1 else ""
    yield f"data: {train} tokens to train on{times}; {valid} to validate with"
    if len(summaries) == 1:
        return
    ordered = sorted(summaries, key=lambda it: it.epochs, reverse=True)
    for it in ordered[:_DATASETS]:
        yield (
            f"data: {it.share:.1%} from {it.prefix}, {it.epochs:.3g} epochs of "
            f"{short_number(it.train_tokens)} tokens"
        )
    if len(ordered) > _DATASETS:
        rest = ordered[_DATASETS:]
        share = sum(it.share for it in rest)
        yield f"data: {share:.1%} from {len(rest)} more, at most {rest[0].epochs:.3g} epochs each"


def short_number(value: float) -> str:
    """Three significant digits: 0.0123, 1.23, 123, 1.23k, 123M."""
    # Rounded first, so that 999,950 becomes 1M and not 1000k.
    value = float(f"{value:.3g}")
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if unit <= value < math.inf:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


class MetricsWriter:
    """Appends to ``metrics.jsonl`` of a run folder and, if asked, to TensorBoard.

    Each line is handed to the operating system at once, so that a killed process loses none. Making
    a writer changes nothing; ``write_start`` does.

    Args:
        folder: the run folder; it exists.
        tensorboard: write ``folder/tensorboard`` too.
        enabled: False makes a writer that does nothing, for all ranks but one.
        resume_step: the last step that counts, 0 at the start of a run; later lines are cut.
        guard: called before each line; raises if the folder belongs to another run by now.

    Raises:
        ConfigError: if TensorBoard is asked for and not installed.
        DiskError: if a file cannot be read or written, here or in any of the methods.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool,
        enabled: bool,
        resume_step: int,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = folder / METRICS_FILE
        self._resume_step = resume_step
        self._enabled = enabled
        self._guard = guard
        self._file: BinaryIO | None = None
        self._board_folder = folder / "tensorboard" if tensorboard and enabled else None
        self._board: SummaryWriter | None = None
        if not enabled:
            return
        if not folder.is_dir():
            raise DiskError(f"{self._path}: cannot be written: No such file or directory")
        if self._board_folder is not None:
            _check_tensorboard(self._board_folder)
        self._found = survey(self._path, resume_step)
        tell_damage(self._found)

    def write_start(
        self, info: Mapping[str, Any], beside: Mapping[Path, bytes] | None = None
    ) -> None:
        """Tell of a start of the run: layout, device, number of parameters, config, ...

        ``bloom report`` shows every entry; "config" apart from the others.

        Args:
            beside: files that appear together with this line, or not at all.
        """
        if not self._enabled:
            return
        self._guard()
        time = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"event": "start", "step": self._resume_step, "time": time, **info}
        begin_metrics(self._found, record, beside or {})
        self._open()

    def write_step(self, metrics: StepMetrics) -> None:
        """Tell of a step."""
        exact = {"loss_hex": metrics.loss.hex(), "grad_norm_hex": metrics.grad_norm.hex()}
        self._append({"event": "step", **asdict(metrics), **exact})
        self._plot(
            metrics.step,
            {
                "train/loss": metrics.loss,
                "train/learning_rate": metrics.learning_rate,
                "train/grad_norm": metrics.grad_norm,
                "train/loss_scale": metrics.loss_scale,
                "train/skipped_steps": metrics.skipped_steps,
                "train/global_batch_size": metrics.global_batch_size,
                "train/consumed_tokens": metrics.consumed_tokens,
                "speed/step_seconds": metrics.step_seconds,
                "speed/tokens_per_second": metrics.tokens_per_second,
                "speed/tflops_per_device": metrics.tflops_per_device,
                "speed/mfu": metrics.mfu,
                "speed/peak_memory_bytes": metrics.peak_memory_bytes,
            },
        )

    def write_eval(self, metrics: EvalMetrics) -> None:
        """Tell of an evaluation."""
        self._append({"event": "eval", **asdict(metrics), "perplexity": metrics.perplexity})
        self._plot(
            metrics.step,
            {
                f"{metrics.split}/loss": metrics.loss,
                f"{metrics.split}/perplexity": metrics.perplexity,
                f"{metrics.split}/bits_per_byte": metrics.bits_per_byte,
            },
        )

    def write_save(self, step: int) -> None:
        """Tell of a save: that there has to be one."""
        self._append({"event": "save", "step": step})

    def flush(self) -> None:
        """Let what TensorBoard was told be seen, and outlast this process.

        It waits for the disk. What is not saved either need not be there after a crash.
        """
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Finish the files; nothing can be written afterwards."""
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            with _telling_disk_errors(self._path):
                self._file.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        if not self._enabled:
            return
        self._guard()
        file = self._open()
        with _telling_disk_errors(self._path):
            file.write(encode_record(record))
            file.flush()

    def _open(self) -> BinaryIO:
        """The file, to be appended to; TensorBoard is opened with it."""
        if self._file is None:
            with _telling_disk_errors(self._path):
                self._file = self._path.open("ab")
            if self._board_folder is not None:
                with _telling_disk_errors(self._board_folder):
                    self._board = _open_tensorboard(self._board_folder, self._resume_step)
        return self._file

    def _plot(self, step: int, values: Mapping[str, float | None]) -> None:
        if self._board is None:
            return
        for tag, value in values.items():
            if value is not None:
                self._board.add_scalar(tag, value, step)


@contextmanager
def _telling_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {error.strerror}") from error


def read_metrics(path: Path) -> list[Record]:
    """The records of a ``metrics.jsonl``, in order; an unfinished last line is left out.

    Raises:
        DataError: if the file cannot be read, or a line is not a record of ours.
    """
    try:
        with path.open("rb") as file:
            lines = list(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    records = []
    for number, (_, record) in enumerate(decode_lines(lines), start=1):
        if record is None:
            raise DataError(
                f"{path}, line {number}: must be a JSON object with event and step, as it was "
                "written"
            )
        records.append(record)
    return records


def _check_tensorboard(folder: Path) -> None:
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "log.tensorboard true needs TensorBoard, which is not installed: "
            "pip install -c constraints.txt -e .[tensorboard]"
        ) from error
    if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise DiskError(f"{folder}: cannot be written: is no folder, or read-only")


def _open_tensorboard(folder: Path, resume_step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    # Hides what an earlier start wrote of the steps that come again.
    return SummaryWriter(folder, purge_step=resume_step + 1)
