"""What a program that trains from Python is told of its run, and what it gets at the end."""

from dataclasses import dataclass
from pathlib import Path

from megatron.training.metrics import EvalMetrics, StepMetrics
from megatron.training.progress import Progress


class Callback:
    """Told of what a run does. A subclass says what to do about it; by default that is nothing.

    All methods are called on every rank, between two steps, and may not communicate. What one
    raises ends the run as any other error does.
    """

    def on_step(self, metrics: StepMetrics) -> None:
        """After a step."""

    def on_evaluation(self, metrics: EvalMetrics) -> None:
        """After an evaluation."""

    def on_save(self, step: int, path: Path) -> None:
        """After step ``step`` was saved as ``path``."""


@dataclass(frozen=True)
class TrainResult:
    """How a run has ended.

    Attributes:
        progress: how far the run has come, over all its starts.
        complete: no further batch fits into train.samples.
        last_step: of this start; None if nothing was left to do.
        last_evaluation: of this start; None if there was none.
        save: the newest save; None if there is none.
    """

    progress: Progress
    complete: bool
    last_step: StepMetrics | None
    last_evaluation: EvalMetrics | None
    save: Path | None
