"""How a run is spread over ranks."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from megatron.config.rules import require, require_positive

ScheduleName: TypeAlias = Literal["1f1b", "interleaved_1f1b", "zero_bubble"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the run is spread over ranks."""

    tensor: int = 1
    """Ranks that share each layer."""
    pipeline: int = 1
    """Ranks that hold different layers."""
    data: int | None = None
    """Ranks that read different samples; null is all that the other sizes leave."""
    sequence: bool = False
    """Sequence parallelism: a tensor rank keeps a part of the sequence between parallel layers."""
    symmetric_memory: bool = False
    """With sequence: communicate beside products, between GPUs that read each other's memory."""
    zero: Literal[0, 1, 2, 3] = 0
    """What data ranks share: 1 optimizer state, 2 also gradients, 3 also weights."""
    schedule: ScheduleName = "1f1b"
    """Order of the microbatches in the pipeline."""
    chunks: int = 1
    """Stages on each rank of the pipeline; more than 1 needs schedule interleaved_1f1b."""
    partition: Literal["cost", "count"] = "cost"
    """What is shared out evenly over stages: operations, or layers with embedding and head."""

    def __post_init__(self) -> None:
        require_positive("parallel", tensor=self.tensor, pipeline=self.pipeline, chunks=self.chunks)
        if self.data is not None:
            require_positive("parallel", data=self.data)
        require(
            not self.symmetric_memory or (self.sequence and self.tensor > 1),
            "parallel.symmetric_memory needs parallel.sequence true and parallel.tensor of at "
            f"least 2, got {str(self.sequence).lower()} and {self.tensor}",
        )
        self._check_schedule()

    def _check_schedule(self) -> None:
        interleaved = self.schedule == "interleaved_1f1b"
        require(
            (self.chunks > 1) == interleaved,
            f"parallel.schedule {self.schedule} needs parallel.chunks "
            f"{'of at least 2' if interleaved else '1'}, got {self.chunks}",
        )
        require(
            self.schedule == "1f1b" or self.pipeline > 1,
            f"parallel.schedule {self.schedule} needs parallel.pipeline of at least 2, "
            f"got {self.pipeline}",
        )
        require(
            self.schedule != "zero_bubble" or self.zero < 2,
            "parallel.schedule zero_bubble needs parallel.zero 0 or 1, "
            f"got {self.zero}: it puts weight gradients off, and FSDP wants them at once",
        )

    @property
    def num_stages(self) -> int:
        return self.pipeline * self.chunks
