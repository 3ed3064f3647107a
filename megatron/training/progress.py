"""How far a run has come: all that changes of a run, besides weights and optimizer state."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Steps made and samples consumed, which the order of the data and all schedules follow.

    Tokens are told besides: the samples of a run need not all be of one length.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0

    def after(self, batch_size: int, seq_length: int) -> "Progress":
        """The progress after one more step of ``batch_size`` samples of ``seq_length`` tokens."""
        return Progress(
            self.step + 1,
            self.consumed_samples + batch_size,
            self.consumed_tokens + batch_size * seq_length,
        )
