"""What a run saves, who saves it, and what may differ when it goes on."""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.config import Config
from megatron.engine.base import Engine, Read, StepResult
from megatron.errors import CheckpointError, NonFiniteError
from megatron.model.inputs import ModelInputs
from megatron.training.progress import Progress
from megatron.training.saving import RunCheckpoints, open_newest
from megatron.tuning.attention import AttentionChoice, choose_backend
from mpu import Box, ShardedTensor
from tests.distributed import run_ranks
from tests.megatron.training.sample import make_config, make_launch

CHOICES = AttentionChoice("blocked", "cpu").to_state()
ON_GPU = AttentionChoice("flex", "cuda")


class TwoTensors(Engine):
    """Holds two tensors."""

    def __init__(self, value: float) -> None:
        self.cut = torch.full((8, 2), value)
        self.whole = torch.full((3,), value)
        self.updates = value

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def state(self) -> list[ShardedTensor]:
        return [
            ShardedTensor("weight", "cut", (8, 2), (Box((0, 0), self.cut),), owned=True),
            ShardedTensor("weight", "whole", (3,), (Box((0,), self.whole),), owned=True),
        ]

    def scalars(self) -> dict[str, float]:
        return {"updates": self.updates}

    def load_state(self, read: Read, scalars: Mapping[str, float]) -> None:
        read(self.state())
        self.updates = scalars["updates"]

    def train_step(self, microbatches: Iterable[ModelInputs], lr: float) -> StepResult:
        raise NotImplementedError

    def trial(self, microbatches: Iterable[ModelInputs]) -> None:
        raise NotImplementedError

    def evaluate(self, microbatches: Iterable[ModelInputs]) -> float:
        raise NotImplementedError


def test_the_choice_of_a_backend_comes_back_from_the_save(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert run_ranks(1, save_and_choose, config) == [ON_GPU]


def save_and_choose(config: Config) -> AttentionChoice:
    choices = ON_GPU.to_state()
    RunCheckpoints(config, make_launch(), TwoTensors(7.0), None, choices).save(Progress(5, 20))
    newest = open_newest(config)
    assert newest is not None
    # Where the config leaves the choice open; this machine could not measure anything.
    return choose_backend(config, torch.device("cuda"), newest.reader.state, group=None)


def checkpoints(config: Config, engine: Engine) -> RunCheckpoints:
    return RunCheckpoints(config, make_launch(), engine, None, CHOICES)


def save_and_resume(config: Config, later: Config) -> tuple[Progress, bool, float]:
    checkpoints(config, TwoTensors(7.0)).save(Progress(5, 20))
    engine = TwoTensors(0.0)
    progress = checkpoints(later, engine).resume(open_newest(later))
    return progress, bool((engine.cut == 7).all() and (engine.whole == 7).all()), engine.updates


def test_resumed_state_and_progress_are_the_saved_ones(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert run_ranks(1, save_and_resume, config, config) == [(Progress(5, 20), True, 7)]


def test_run_without_saves_starts_at_the_beginning(tmp_path: Path) -> None:
    assert run_ranks(1, start, make_config(tmp_path)) == [(Progress(0, 0), 0)]


def start(config: Config) -> tuple[Progress, float]:
    engine = TwoTensors(0.0)
    return checkpoints(config, engine).resume(open_newest(config)), engine.updates


def test_changed_options_are_told(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    later = replace(
        config,
        model=replace(config.model, hidden_dropout=0.25),
        train=replace(config.train, seed=9),
    )
    ((told, kept),) = run_ranks(1, save_and_listen, config, later)
    assert told == [
        "model.hidden_dropout is now 0.25, and was 0.0 at the save",
        "train.seed is now 9, and was 1234 at the save",
    ]
    assert kept == (Progress(5, 20), True, 7)


def save_and_listen(
    config: Config, later: Config
) -> tuple[list[str], tuple[Progress, bool, float]]:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    kept = save_and_resume(config, later)
    return [message for message in heard if " is now " in message], kept


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_save_that_holds_no_numbers_is_refused(tmp_path: Path, value: float) -> None:
    """As versions before wrote it."""
    (message,) = run_ranks(1, refuse_numbers, make_config(tmp_path), value)
    path = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert message == (
        f"{path}: the weight of cut is not finite on rank 0; "
        "to go on from an older save, move this one away"
    )


def refuse_numbers(config: Config, value: float) -> str:
    engine = TwoTensors(7.0)
    engine.cut[3, 1] = value
    checkpoints(config, engine).save(Progress(5, 20))
    with pytest.raises(NonFiniteError) as caught:
        checkpoints(config, TwoTensors(0.0)).resume(open_newest(config))
    assert caught.value.on_every_rank
    return str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"), [("num_layers", 2), ("vocab_size", 50000), ("position_embedding", "none")]
)
def test_another_model_is_refused_by_the_option(tmp_path: Path, option: str, value: object) -> None:
    config = make_config(tmp_path)
    later = replace(config, model=replace(config.model, **{option: value}))  # type: ignore[arg-type]
    before = getattr(config.model, option)
    (message,) = run_ranks(1, refusal, config, later)
    assert message.startswith(f"model.{option} is {value}, but {before} in {tmp_path}")


def refusal(config: Config, later: Config) -> str:
    with pytest.raises(CheckpointError) as caught:
        save_and_resume(config, later)
    return str(caught.value)
