"""What a save says of its run is read once, and refused by name where it is not that of a run."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron.checkpoint.load import CheckpointReader
from megatron.config import RampupConfig, config_to_dict
from megatron.data.history import Phase
from megatron.errors import CheckpointError
from megatron.training.progress import Progress
from megatron.training.saved_run import SavedRun, read_saved_run
from tests.megatron.training.sample import SEQ_LENGTH, make_config

RAMPUP = {"start": 2, "increment": 2, "samples": 8}


def make_fields(folder: Path) -> dict[str, Any]:
    """State and config of a save, of which a case spoils one field."""
    config = make_config(folder, train={"rampup": RampupConfig(**RAMPUP)})
    state = {
        "step": 3,
        "consumed_samples": 12,
        "consumed_tokens": 96,
        "engine": {"updates": 3.0, "loss_scale": 8.0, "good_steps": 1, "patience": 2},
        "phases": [{"first": 0, "seq_length": SEQ_LENGTH, "num_samples": 32}],
    }
    return {"state": state, "config": config_to_dict(config)}


def read(fields: dict[str, Any]) -> SavedRun:
    reader = SimpleNamespace(path=Path("a/save"), **fields)
    return read_saved_run(cast(CheckpointReader, reader))


def test_everything_that_a_run_goes_on_with_is_typed(tmp_path: Path) -> None:
    saved = read(make_fields(tmp_path))
    assert saved.progress == Progress(3, 12, 96)
    assert saved.phases == [Phase(0, SEQ_LENGTH, 32)]
    assert saved.seq_length == SEQ_LENGTH
    assert (saved.train.samples, saved.train.global_batch_size) == (32, 4)
    assert saved.train.rampup == RampupConfig(**RAMPUP)
    assert saved.optimizer == make_config(tmp_path).optimizer
    assert saved.engine["updates"] == 3


def test_what_saves_of_before_did_not_say_follows_from_the_rest(tmp_path: Path) -> None:
    fields = make_fields(tmp_path)
    del fields["state"]["phases"], fields["state"]["consumed_tokens"]
    saved = read(fields)
    assert saved.progress.consumed_tokens == 12 * SEQ_LENGTH
    # Batches of 2 for 8 samples, then of 4: the order was made for all 32.
    assert saved.phases == [Phase(0, SEQ_LENGTH, 32)]


SPOILED: dict[str, tuple[tuple[str | int, ...], object]] = {
    "step must be a whole number": (("state", "step"), "3"),
    "consumed_samples must be": (("state", "consumed_samples"), -1),
    "consumed_tokens must be": (("state", "consumed_tokens"), 2**62),
    "engine must be a mapping": (("state", "engine"), None),
    "engine.updates must be": (("state", "engine", "updates"), 0.5),
    "engine.loss_scale must be above 0": (("state", "engine", "loss_scale"), 0),
    "engine.good_steps must be": (("state", "engine", "good_steps"), True),
    "phases must be a list": (("state", "phases"), []),
    "phases must hold mappings": (("state", "phases", 0), 7),
    "phases.first must be": (("state", "phases", 0, "first"), None),
    "config.model must be a section": (("config", "model"), []),
    "config.model.seq_length must be": (("config", "model", "seq_length"), 2**40),
    "config.data must be a section": (("config", "data"), "text"),
    "config.train.rampup must be a section": (("config", "train", "rampup"), 0),
    "config.train.samples cannot be": (("config", "train", "samples"), 1.5),
    "train.samples must be greater than 0": (("config", "train", "samples"), 0),
    "config.optimizer.decay cannot be": (("config", "optimizer", "decay"), "none"),
    "optimizer.lr must be greater than 0": (("config", "optimizer", "lr"), -1.0),
}


@pytest.mark.parametrize("message", SPOILED)
def test_a_field_that_no_run_has_is_refused_by_name(tmp_path: Path, message: str) -> None:
    place, value = SPOILED[message]
    fields = deepcopy(make_fields(tmp_path))
    inner: Any = fields
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    with pytest.raises(CheckpointError, match=f"a/save: .*{message}") as refused:
        read(fields)
    assert refused.value.on_every_rank


def test_a_plan_of_more_steps_than_any_run_is_not_counted(tmp_path: Path) -> None:
    fields = make_fields(tmp_path)
    del fields["state"]["phases"]
    fields["config"]["train"]["samples"] = 2**39
    with pytest.raises(CheckpointError, match="more than of any run"):
        read(fields)
