"""A run of the engine on a device that is not there: every collective and every wait of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import torch.distributed as dist

from megatron.checkpoint.load import open_checkpoint
from megatron.checkpoint.save import save_checkpoint
from megatron.config import Backend, Config
from megatron.data.sampler import microbatch_samples
from megatron.engine.torch_engine import TorchEngine
from megatron.model.inputs import ModelInputs, build_inputs
from megatron.training.replicas import check_replicas
from mpu import ParallelGroups, broadcast_batch, build_groups
from tests.megatron.engine.training import (
    EOD,
    GLOBAL_BATCH,
    Dtype,
    Layout,
    make_config,
    make_sample,
)
from tests.pretend.device import Call, MixedDevicesError, Wait, Watch, pretend


@dataclass(frozen=True)
class Run:
    """A layout, and what else decides which operations a run asks for.

    Attributes:
        is_short: build, step and compare only.
    """

    layout: Layout
    dtype: Dtype = "bf16"
    dropout: bool = False
    backend: Backend = "blocked"
    is_short: bool = False
    model: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        words = [str(self.layout), self.dtype, self.backend]
        words += ["dropout"] if self.dropout else []
        return ", ".join([*words, *(f"{name} {value}" for name, value in self.model)])

    @property
    def config(self) -> Config:
        config = make_config(self.layout, self.dtype)
        model = replace(config.model, **dict(self.model))
        if not self.dropout:
            # Its random numbers are half of all operations, and the same ones everywhere.
            model = replace(model, hidden_dropout=0.0, attention_dropout=0.0)
        return replace(config, model=model)


@dataclass(frozen=True)
class Watched:
    """What one rank asked for, and what ended it."""

    calls: list[Call]
    waits: list[Wait]
    error: str


Plant: TypeAlias = Callable[[pytest.MonkeyPatch], None]


def watch_rank(run: Run, folder: Path, plant: Plant | None = None) -> Watched:
    """Build, step, compare, try, evaluate, save and load, in the run's layout.

    Args:
        folder: for the save, on all ranks.
        plant: puts a fault into the program.
    """
    device = pretend()
    groups = build_groups(run.config.layout(dist.get_world_size()))
    error = ""
    with Watch() as watch, pytest.MonkeyPatch.context() as patch:
        if plant is not None:
            plant(patch)
        try:
            _go(run, groups, device, watch, folder)
        except MixedDevicesError as found:
            error = str(found)
    return Watched(watch.calls, watch.waits, error)


def _go(run: Run, groups: ParallelGroups, device: torch.device, watch: Watch, folder: Path) -> None:
    config = run.config
    with watch.phase("build"):
        engine = TorchEngine(config, groups, device, run.backend)
    with watch.phase("step"):
        engine.train_step(read(config, groups, device), lr=1e-3)
    with watch.phase("comparison"):
        check_replicas(engine, groups)
    if run.is_short:
        return
    with watch.phase("trial"):
        engine.trial(read(config, groups, device))
    with watch.phase("evaluation"):
        engine.evaluate(read(config, groups, device))
    with watch.phase("save and load"):
        save_and_load(engine, folder)


def read(
    config: Config, groups: ParallelGroups, device: torch.device, step: int = 0
) -> Iterator[ModelInputs]:
    """The microbatches of this rank, from the first tensor rank to the device as in a run."""
    data, size = groups.data, config.train.least_micro_batch_size
    first = step * GLOBAL_BATCH
    for part in microbatch_samples(first, GLOBAL_BATCH, size, data.rank(), data.size()):
        batch = None
        if groups.tensor.rank() == 0:
            tokens = torch.stack([make_sample(number) for number in part])
            batch = {"tokens": tokens, "samples": torch.tensor(list(part))}
        got = broadcast_batch(batch, ("tokens", "samples"), group=groups.tensor, device=device)
        dtype = torch.promote_types(config.train.torch_dtype, torch.float32)
        yield build_inputs(got["tokens"], got["samples"], config.data, EOD, dtype)


def save_and_load(engine: TorchEngine, folder: Path, other: TorchEngine | None = None) -> None:
    """Save the engine, and load that into the other one, or itself."""
    path = save_checkpoint(
        folder,
        1,
        engine.state(),
        state={},
        config={},
        layout={},
        files={},
        group=dist.group.WORLD,
        keep_last=0,
    )
    reader = open_checkpoint(path, group=dist.group.WORLD)
    (other or engine).load_state(reader.read_into, engine.scalars())
