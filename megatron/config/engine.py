"""Which engine makes the training step, and what is handed to it as it is."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What drives forward, backward and the update."""

    name: Literal["torch", "deepspeed"] = "torch"
    """deepspeed needs the package of that name: pip install -e .[deepspeed]."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """More options of DeepSpeed, as in its JSON file, such as those of zero_optimization."""
