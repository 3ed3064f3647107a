"""Saving a run, and going on from a save at any layout."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.checkpoint.folders import find_latest
from megatron.checkpoint.format import StateTensor
from megatron.checkpoint.load import CheckpointReader, open_checkpoint
from megatron.checkpoint.save import save_checkpoint
from megatron.config import Config, config_to_dict
from megatron.engine.base import Engine, NamedState
from megatron.errors import CheckpointError
from megatron.launch import Launch
from megatron.together import run_on_first
from megatron.tokenizer import Tokenizer
from megatron.training.changes import check_changes, read_progress
from megatron.training.progress import Progress

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"


class RunCheckpoints:
    """The saves of one run. All methods are collective.

    Args:
        choices: what the run has chosen by itself and a save keeps, as names and JSON.
    """

    def __init__(
        self,
        config: Config,
        launch: Launch,
        engine: Engine,
        tokenizer: Tokenizer | None,
        choices: Mapping[str, Any],
    ) -> None:
        self._config = config
        self._launch = launch
        self._engine = engine
        self._tokenizer = tokenizer
        self._choices = choices
        self._folder = config.folder / CHECKPOINTS

    def save(self, progress: Progress) -> None:
        """Save the state after ``progress``.

        Raises:
            DiskError: if there is no room, or a file cannot be written.
        """
        path = save_checkpoint(
            self._folder,
            progress.step,
            state_tensors(self._engine.named_state()),
            state={
                "step": progress.step,
                "consumed_samples": progress.consumed_samples,
                "consumed_tokens": progress.consumed_tokens,
                "engine": self._engine.scalars(),
                **self._choices,
            },
            config=config_to_dict(self._config),
            layout=vars(self._launch.groups.dims),
            files=_tokenizer_files(self._tokenizer),
            group=dist.group.WORLD,
            keep_last=self._config.checkpoint.keep_last,
        )
        logger.info("saved %s", path)

    def resume(self, reader: CheckpointReader | None) -> Progress:
        """Load what ``open_newest`` gave; the progress that it was made at.

        Raises:
            CheckpointError: if it is of another model, or cannot be read.
        """
        if reader is None:
            logger.info("fresh start: no save in %s", self._folder)
            return Progress()
        progress = read_progress(reader)
        check_changes(self._config, reader, progress)
        self._engine.load_state(
            lambda state: reader.read_into(state_tensors(state)), reader.state["engine"]
        )
        logger.info("resumed from %s, saved at layout %s", reader.path, dict(reader.layout))
        return progress


def open_newest(config: Config) -> CheckpointReader | None:
    """The newest save of the run if there is one, as ``checkpoint.resume`` asks. Collective.

    Raises:
        CheckpointError: if there has to be a save and is none, or it is damaged.
    """
    world = dist.group.WORLD
    path = run_on_first(lambda: _find_newest(config), world)
    return None if path is None else open_checkpoint(path, group=world)


def _find_newest(config: Config) -> Path | None:
    resume, folder = config.checkpoint.resume, config.folder / CHECKPOINTS
    latest = find_latest(folder)
    if resume == "required" and latest is None:
        found = sorted(path.name for path in folder.glob("*"))
        raise CheckpointError(
            f"checkpoint.resume required: {folder} holds no valid save, but "
            f"{', '.join(found) or 'nothing at all'}"
        )
    if resume == "never" and latest is not None:
        raise CheckpointError(
            f"checkpoint.resume never: {folder} holds the saves of another run, the "
            f"newest {latest.name}; choose another folder or remove them"
        )
    return latest


def state_tensors(state: Iterable[NamedState]) -> list[StateTensor]:
    """What an engine calls its state, as checkpoints call it."""
    return [StateTensor(it.kind, it.name, it.shape, it.boxes, it.owned) for it in state]


def _tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    return {f"{TOKENIZER}/{name}": content for name, content in tokenizer.files().items()}
