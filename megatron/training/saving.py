"""Saving a run, and going on from a save at any layout."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.checkpoint.folders import set_aside, step_folder, step_folders
from megatron.checkpoint.load import open_checkpoint
from megatron.checkpoint.save import save_checkpoint
from megatron.config import Config, config_to_dict
from megatron.engine.base import Engine
from megatron.errors import CheckpointError, DiskError, NonFiniteError
from megatron.launch import Launch
from megatron.together import run_on_first
from megatron.tokenizer import Tokenizer
from megatron.training.changes import check_changes
from megatron.training.finite import check_finite
from megatron.training.metrics import METRICS_FILE
from megatron.training.metrics_file import last_save
from megatron.training.progress import Progress
from megatron.training.saved_run import SavedRun, read_saved_run

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"


class RunCheckpoints:
    """The saves of one run. All methods are collective.

    Args:
        choices: what the run has chosen by itself and a save keeps, as names and JSON.
        guard: called on the first rank before anything is written; raises if the folder belongs to
            another run by now.
    """

    def __init__(
        self,
        config: Config,
        launch: Launch,
        engine: Engine,
        tokenizer: Tokenizer | None,
        choices: Mapping[str, Any],
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._launch = launch
        self._engine = engine
        self._tokenizer = tokenizer
        self._choices = choices
        self._guard = guard
        self._folder = config.folder / CHECKPOINTS
        self._resumed = Progress()

    def save(self, progress: Progress) -> Path:
        """Save the state after ``progress``, and return the path of the save.

        Raises:
            DiskError: if there is no room, or a file cannot be written.
        """
        path = save_checkpoint(
            self._folder,
            progress.step,
            self._engine.state(),
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
            guard=self._guard,
        )
        logger.info("saved %s", path)
        return path

    def resume(self, saved: SavedRun | None) -> Progress:
        """Load what ``open_newest`` gave; the progress that it was made at.

        Raises:
            CheckpointError: if it is of another model, or cannot be read.
            NonFiniteError: if it holds a number that is none, which versions before let pass.
        """
        if saved is None:
            logger.info("fresh start: no save in %s", self._folder)
            return Progress()
        check_changes(self._config, saved)
        reader = saved.reader
        self._engine.load_state(reader.read_into, saved.engine)
        self._check_loaded(saved.path)
        logger.info("resumed from %s, saved at layout %s", saved.path, dict(reader.layout))
        self._resumed = saved.progress
        return saved.progress

    def _check_loaded(self, path: Path) -> None:
        try:
            check_finite(self._engine.state(), self._engine.device, group=None)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{path}: {error}; to go on from an older save, move this one away",
                on_every_rank=True,
            ) from error

    def set_damaged_aside(self) -> None:
        """Rename the saves that were passed over, so that their steps can be saved again.

        Raises:
            DiskError: if that fails.
        """
        run_on_first(self._set_damaged_aside, dist.group.WORLD)

    def _set_damaged_aside(self) -> None:
        self._guard()
        # It went on from the newest whole one.
        for step, path in step_folders(self._folder):
            if step > self._resumed.step:
                try:
                    set_aside(path)
                except OSError as error:
                    raise DiskError(f"{path}: cannot be renamed: {error.strerror}") from error


def open_newest(config: Config) -> SavedRun | None:
    """The newest save of the run if there is one, as ``checkpoint.resume`` asks. Collective.

    With ``checkpoint.skip_damaged`` the newest whole one.

    Raises:
        CheckpointError: if there has to be a save and is none, or it is damaged.
    """
    world = dist.group.WORLD
    options = config.checkpoint
    saves = run_on_first(lambda: _find_saves(config), world)
    for step, path in saves:
        try:
            return _open(path, step)
        except CheckpointError as error:
            if not options.skip_damaged:
                raise CheckpointError(
                    f"{error}\ncheckpoint.skip_damaged true passes over it",
                    on_every_rank=True,
                ) from error
            logger.warning("passed over, as checkpoint.skip_damaged asks: %s", error)
    if options.resume == "required":
        names = ", ".join(path.name for _, path in reversed(saves)) or "nothing at all"
        raise CheckpointError(
            f"checkpoint.resume required: {config.folder / CHECKPOINTS} holds no valid save, but "
            f"{names}",
            on_every_rank=True,
        )
    if saves:
        logger.warning("no whole save is left in %s", config.folder / CHECKPOINTS)
    return None


def _open(path: Path, step: int) -> SavedRun:
    reader = open_checkpoint(path, group=dist.group.WORLD)
    found = reader.state.get("step")
    if found != step:
        raise CheckpointError(f"{path}: is the save of step {found!r:.20}", on_every_rank=True)
    return read_saved_run(reader)


def _find_saves(config: Config) -> list[tuple[int, Path]]:
    """Steps and paths of the saves of the run, newest first, damaged or not.

    Raises:
        CheckpointError: if there must be none, or the metrics tell that all are gone.
    """
    options, folder = config.checkpoint, config.folder / CHECKPOINTS
    saves = step_folders(folder)[::-1]
    if options.resume == "never" and saves:
        raise CheckpointError(
            f"checkpoint.resume never: {folder} holds the saves of another run, the "
            f"newest {saves[0][1].name}; choose another folder or remove them"
        )
    metrics = config.folder / METRICS_FILE
    told = last_save(metrics)
    newest = saves[0][0] if saves else 0
    if told <= newest or options.resume == "never":
        return saves
    gone = f"{metrics}: tells of the save {step_folder(folder, told).name}, but {folder} holds"
    if not saves and options.resume == "auto" and not options.skip_damaged:
        raise CheckpointError(
            f"{gone} none at all; bring it back, choose another folder, or let "
            "checkpoint.skip_damaged true start afresh"
        )
    logger.warning("%s %s", gone, f"no newer one than {saves[0][1].name}" if saves else "none")
    return saves


def _tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    return {f"{TOKENIZER}/{name}": content for name, content in tokenizer.files().items()}
