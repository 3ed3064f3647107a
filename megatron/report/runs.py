"""What ``metrics.jsonl`` tells of a run: its steps, its evaluations and its starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatron.config.dotted import flatten
from megatron.errors import DataError
from megatron.training.metrics import METRICS_FILE, Record, read_metrics
from megatron.training.run_folder import check_run_folder

Floats: TypeAlias = NDArray[np.float64]

FINAL_STEPS = 20
"""So many of the last steps the final loss is the mean of; a single one is noise."""
SPLITS = {"valid": "validation", "test": "test"}


@dataclass(frozen=True)
class Start:
    """One start of a run.

    Attributes:
        told: its record; empty if it has none.
        steps: those that it made, less those that a later start made again.
    """

    told: Record
    steps: list[Record]

    @property
    def options(self) -> dict[str, Any]:
        """The options of its config, by dotted names."""
        config = self.told.get("config")
        return dict(flatten(config)) if isinstance(config, Mapping) else {}


@dataclass(frozen=True)
class Run:
    """The records of a run; there is at least one step."""

    name: str
    starts: list[Start]
    evals: list[Record]

    @property
    def steps(self) -> list[Record]:
        """The steps of all starts."""
        return [step for start in self.starts for step in start.steps]

    def column(self, field: str) -> Floats:
        """Field ``field`` of every step; what is null is NaN."""
        return column(self.steps, field)

    def evaluations(self) -> dict[str, list[Record]]:
        """The evaluations of each split, under the name to show."""
        splits = {
            name: [e for e in self.evals if e.get("split") == s] for s, name in SPLITS.items()
        }
        return {name: records for name, records in splits.items() if records}

    @property
    def working(self) -> list[Start]:
        """The starts that made a step."""
        return [start for start in self.starts if start.steps]

    @property
    def newest(self) -> Start:
        """The last start that made a step."""
        return self.working[-1]

    @property
    def resumes(self) -> list[int]:
        """The steps after which the run went on from a checkpoint."""
        return [start.steps[0]["step"] - 1 for start in self.working[1:]]

    @property
    def final_loss(self) -> float:
        """The mean of the finite losses of the last steps; NaN if there are none."""
        loss = self.column("loss")[-FINAL_STEPS:]
        finite = loss[np.isfinite(loss)]
        return float(finite.mean()) if finite.size else np.nan

    @property
    def loss_scale(self) -> Floats:
        """That of every step, NaN where there was none: but under fp16, and in older runs."""
        return column([{"loss_scale": None, **step} for step in self.steps], "loss_scale")

    @property
    def seconds(self) -> float:
        """Time spent on the steps, over all starts."""
        return float(column([start.steps[-1] for start in self.working], "elapsed_seconds").sum())


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the metrics of the runs in ``folders``, named after them.

    Raises:
        DataError: if there are none, or they are damaged.
    """
    names = [folder.resolve().name for folder in folders]
    return [
        _load_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def _load_run(folder: Path, name: str) -> Run:
    check_run_folder(folder)
    path = folder / METRICS_FILE
    starts, evals = [Start({}, [])], []
    for record in read_metrics(path):
        if record["event"] == "start":
            starts.append(Start(record, []))
        elif record["event"] == "step":
            starts[-1].steps.append(record)
        elif record["event"] == "eval":
            evals.append(record)
    if not any(start.steps for start in starts):
        raise DataError(f"{path}: must hold at least one finished step, found none")
    return Run(name, [start for start in starts if start.told or start.steps], evals)


def column(records: Sequence[Record], field: str) -> Floats:
    """Field ``field`` of ``records``, of which there is one; what is null is NaN.

    Raises:
        DataError: if one of them is no number.
    """
    try:
        values = [record[field] for record in records]
        return np.array([np.nan if v is None else float(v) for v in values])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{METRICS_FILE}: every {records[0]['event']} needs a number {field}"
        ) from error
