"""A whole run on a device that is not there: data, steps, evaluation, saves, and going on."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron import launch
from megatron.engine.torch_engine import TorchEngine
from megatron.training.trainer import Trainer
from tests.figures import Figure
from tests.integration.runs import base_argv, make_data, records, run_pretrain, values
from tests.megatron.engine.device_runs import Watched
from tests.megatron.engine.test_devices import check_ranks
from tests.pretend.device import AVAILABLE, NAME, Watch, pretend

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch takes no device from Python")

LAYOUTS: list[Any] = [
    pytest.param(
        {"parallel__tensor": 2, "parallel__sequence": True}, id="tensor", marks=pytest.mark.nightly
    ),
    pytest.param(
        {
            "parallel__pipeline": 2,
            "parallel__data": 2,
            "parallel__zero": 1,
            "train__micro_batch_size": 1,
        },
        id="pipeline",
        marks=pytest.mark.nightly,
    ),
    pytest.param({"parallel__data": 2, "parallel__zero": 3}, id="data", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_asks_all_ranks_for_the_same_and_waits_once_a_step(
    layout: dict[str, Any], tmp_path: Path, figure: Figure
) -> None:
    make_data(tmp_path / "text")
    ranks = 4 if "parallel__pipeline" in layout else 2
    options = {
        "model__num_layers": 2 if ranks == 4 else 1,
        "train__dtype": "bf16",
        "train__samples": 12,
        "train__eval_interval": 2,
        "train__eval_samples": 4,
        "data__split": [0.8, 0.2, 0.0],
        "model__attention_backend": "blocked",
        **layout,
    }
    for steps, changes in ((2, {"train__stop_at_step": 2}), (1, {})):
        notes = tmp_path / f"notes-{steps}"
        notes.mkdir()
        result = run_pretrain(
            base_argv(tmp_path, **{**options, **changes}),
            world_size=ranks,
            prepare=partial(watch_run, notes),
            timeout=120,
        )
        assert result.exit_code == 0, result.stderr
        found = [torch.load(notes / str(rank), weights_only=False) for rank in range(ranks)]
        assert sum(len(rank.calls) for rank in found) > 0
        check_ranks(found, figure, steps)
    assert len(values(tmp_path / "run", "loss")) == 3
    assert len(records(tmp_path / "run", "eval")) == 2


def watch_run(notes: Path) -> None:
    """In every process of a run: use the device, and leave notes of what was asked of it."""
    device = pretend()
    watch = Watch()
    join, train = dist.init_process_group, Trainer.train

    def watched(trainer: Trainer, *args: Any) -> None:
        with watch:
            train(trainer, *args)
            rank = dist.get_rank() if dist.is_initialized() else int(launch.read_environment().rank)
        torch.save(Watched(watch.calls, watch.waits, ""), notes / str(rank))

    def phase(name: str) -> None:
        method = getattr(TorchEngine, name)

        def within(engine: TorchEngine, *args: Any) -> Any:
            with watch.phase({"train_step": "step", "evaluate": "evaluation"}[name]):
                return method(engine, *args)

        setattr(TorchEngine, name, within)

    phase("train_step")
    phase("evaluate")
    changes: list[tuple[Any, str, Any]] = [
        (Trainer, "train", watched),
        (launch, "_choose_device", lambda *args: device),
        (torch.cuda, "get_device_name", lambda *args: NAME),
        (dist, "init_process_group", lambda backend, **kwargs: join("gloo", **kwargs)),
    ]
    for owner, name, change in changes:
        setattr(owner, name, change)
