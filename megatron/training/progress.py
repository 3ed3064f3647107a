"""How far a run has come: all that changes of a run, besides weights and optimizer state."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Steps made and samples consumed, which the order of the data and all schedules follow."""

    step: int = 0
    consumed_samples: int = 0

    def after(self, batch_size: int) -> "Progress":
        """The progress after one more step of ``batch_size`` samples."""
        return Progress(self.step + 1, self.consumed_samples + batch_size)
