"""What surrounds the training: saves, logs, device and patience."""

from dataclasses import dataclass
from typing import Literal

from megatron.config.rules import require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    save_interval: int = 0
    """Steps between saves; 0 saves at the end only."""
    keep_last: int = 2
    """Saves to keep; older ones are removed. 0 keeps all."""
    resume: Literal["auto", "required", "never"] = "auto"
    """Go on from the newest save of the run folder: if there is one, or an error without one."""
    skip_damaged: bool = False
    """Pass over saves that are damaged, and go on from the newest whole one."""

    accept_new_data: bool = False
    """Go on from a save with another corpus, blend, tokenizer, seed or split than the save's."""

    def __post_init__(self) -> None:
        require_not_negative(
            "checkpoint", save_interval=self.save_interval, keep_last=self.keep_last
        )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run tells of itself, besides metrics.jsonl."""

    interval: int = 10
    """Steps between log lines."""
    tensorboard: bool = False
    """Write TensorBoard files into the run folder too; needs the extra of that name."""

    def __post_init__(self) -> None:
        require_positive("log", interval=self.interval)


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Device and patience."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs where they are."""
    startup_timeout: float = 300.0
    """Seconds to wait for the other ranks at the start."""
    timeout: float = 1800.0
    """Seconds to wait for another rank in one collective; on GPUs, in one step or evaluation."""

    def __post_init__(self) -> None:
        require_positive("launch", startup_timeout=self.startup_timeout, timeout=self.timeout)
