"""How a run is spread over ranks."""

from dataclasses import dataclass

from megatron.config.rules import require_positive


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the run is spread over ranks."""

    tensor: int = 1
    """Ranks that share each layer."""
    data: int | None = None
    """Ranks that read different samples; null is all that the tensor size leaves."""
    sequence: bool = False
    """Sequence parallelism: a tensor rank keeps a part of the sequence between parallel layers."""

    def __post_init__(self) -> None:
        require_positive("parallel", tensor=self.tensor)
        if self.data is not None:
            require_positive("parallel", data=self.data)
