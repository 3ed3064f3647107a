"""The data of a run."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron.config.rules import require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data and how it is cut into samples."""

    paths: dict[str, float] = field(default_factory=dict)
    """Prefixes of .bin/.idx files and their weights in the blend. On the command line
    --data.paths.PREFIX WEIGHT, once for each, or all as JSON."""
    split: tuple[float, float, float] = (969, 30, 1)
    """Shares of the documents for training, validation and test."""
    tokenizer: Path | None = None
    """Tokenizer file or folder: gives the end-of-document token, and travels with checkpoints."""
    cache_folder: Path | None = None
    """Where sample orders are kept; null is the folder of the data."""
    reset_attention_mask: bool = False
    """Tokens do not see across the end of a document."""
    reset_position_ids: bool = False
    """Positions start again after the end of a document."""
    eod_mask_loss: bool = False
    """The end-of-document token, as an input, predicts nothing."""

    def __post_init__(self) -> None:
        for path, weight in self.paths.items():
            require(weight > 0, f"data.paths {path}: the weight must be above 0, got {weight}")
        require(
            min(self.split) >= 0 and self.split[0] > 0,
            f"data.split must be three shares, none negative and the first above 0, "
            f"got {list(self.split)}",
        )
        resets = self.reset_attention_mask or self.reset_position_ids or self.eod_mask_loss
        require(
            not resets or self.tokenizer is not None,
            "data.tokenizer is needed by data.reset_attention_mask, data.reset_position_ids and "
            "data.eod_mask_loss, to know the end-of-document token; got null",
        )
