"""Which micro-batch size a run takes: by rule, from a save, or by trials that are made up."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ScheduleName,
    TrainConfig,
)
from megatron.engine.base import Engine
from megatron.engine.torch_engine import TorchEngine
from megatron.launch import Launch
from megatron.model.inputs import ModelInputs
from megatron.training.batches import BatchReader
from megatron.tuning import micro_batch
from megatron.tuning.micro_batch import (
    Cost,
    EngineTrial,
    MicroBatchChoice,
    Trial,
    choose_micro_batch,
)
from mpu import ParallelDims, ParallelGroups, build_groups
from tests.distributed import run_ranks
from tests.figures import Figure
from tests.megatron.data.test_samples import make_dataset
from tests.megatron.training.sample import make_config

CPU = torch.device("cpu")
NO_SAVE: dict[str, Any] = {}
AT_TWO = {"micro_batch": {"size": 2, "device": "cpu", "tensor": 1, "data": 1, "pipeline": 1}}


def launch_at(dims: ParallelDims) -> Launch:
    """A rank at that layout; nothing here communicates by its groups."""
    group = cast(dist.ProcessGroup, None)
    groups = ParallelGroups(dims, *[group] * 5)
    return Launch(0, dims.world_size, CPU, groups)


ALONE = launch_at(ParallelDims())


def auto(folder: Path, **train: Any) -> Config:
    """Batches of 24 samples: 1, 2, 4, 8 and 24 fit on one rank."""
    sizes = {"samples": 48, "global_batch_size": 24, "micro_batch_size": "auto"}
    return make_config(folder, train={**sizes, **train})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return auto(tmp_path)


def no_trial() -> Trial:
    raise AssertionError("nothing is to be tried")


class FakeTrial:
    """A rank on which samples take what they take, and ten bytes each over 100 that are held."""

    def __init__(self, milliseconds: dict[int, float], room: int = 10_000) -> None:
        self.milliseconds = milliseconds
        self.room = room
        self.tried: list[int] = []

    def __call__(self, size: int) -> Cost:
        self.tried.append(size)
        return Cost(self.milliseconds[size], held=100, peak=100 + 10 * size, room=self.room)

    def choose(self, config: Config, saved: dict[str, Any] = NO_SAVE) -> int:
        """On one rank, or collective where there are more."""
        group = dist.group.WORLD
        return choose_micro_batch(config, ALONE, saved, lambda: self, group=group).size


FASTER = {1: 5.0, 2: 4.0, 4: 3.0, 8: 2.0, 24: 1.0}


def test_a_given_size_is_taken(tmp_path: Path) -> None:
    config = make_config(tmp_path, train={"micro_batch_size": 4})
    found = choose_micro_batch(config, ALONE, AT_TWO, no_trial, group=None)
    assert found == MicroBatchChoice(4, "cpu", ParallelDims())


def test_a_lone_candidate_is_not_tried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="megatron")
    config = auto(tmp_path, samples=9, global_batch_size=1)
    assert choose_micro_batch(config, ALONE, NO_SAVE, no_trial, group=None).size == 1
    assert caplog.messages == ["micro-batch size 1: the only one that fits the batches"]


def test_the_fastest_is_taken_and_told_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="megatron")
    trial = FakeTrial({1: 3.0, 2: 1.25, 4: 1.3})
    assert trial.choose(auto(tmp_path, global_batch_size=4)) == 2
    assert trial.tried == [1, 2, 4]
    gib = [f"{(100 + 10 * size) / 2**30:.3g} GiB" for size in trial.tried]
    assert caplog.messages == [
        f"micro-batch size 2: the fastest of 1 (3 ms a sample, {gib[0]}), "
        f"2 (1.25 ms a sample, {gib[1]}), 4 (1.3 ms a sample, {gib[2]})"
    ]


@pytest.mark.parametrize(("third", "tried"), [(2.10, [1, 2, 4, 8]), (2.11, [1, 2, 4])])
def test_the_search_ends_after_a_size_that_is_five_percent_slower(
    config: Config, third: float, tried: list[int]
) -> None:
    trial = FakeTrial({1: 4.0, 2: 2.0, 4: third, 8: 3.0, 24: 1.0})
    assert trial.choose(config) == 2
    assert trial.tried == tried


@pytest.mark.parametrize(
    ("room", "tried"),
    [(340, [1, 2, 4, 8, 24]), (339, [1, 2, 4, 8]), (180, [1, 2, 4, 8]), (179, [1, 2, 4]), (9, [1])],
)
def test_what_would_not_fit_is_not_tried(
    config: Config, room: int, tried: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="megatron")
    trial = FakeTrial(FASTER, room)
    assert trial.choose(config) == tried[-1]
    assert trial.tried == tried
    refused = next((size for size in FASTER if size not in tried), None)
    if refused is not None:
        need, there = (f"{count / 2**30:.3g} GiB" for count in (100 + 10 * refused, room))
        assert caplog.messages[0].endswith(f"; {refused} would need {need} of {there}")


def test_the_slowest_rank_and_the_one_with_least_room_decide_for_all(config: Config) -> None:
    assert run_ranks(2, choose_on_rank, config) == [(4, [1, 2, 4, 8])] * 2


def choose_on_rank(config: Config) -> tuple[int, list[int]]:
    """One rank is slow with 8 samples, and the other has no room for 24."""
    trials = (FakeTrial({**FASTER, 8: 3.1}), FakeTrial(FASTER, room=200))
    trial = trials[dist.get_rank()]
    return trial.choose(config), trial.tried


def test_a_run_that_goes_on_keeps_the_size_of_its_save(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="megatron")
    found = choose_micro_batch(config, ALONE, AT_TWO, no_trial, group=None)
    assert found == MicroBatchChoice(2, "cpu", ParallelDims())
    assert found.to_state() == AT_TWO
    assert caplog.messages == ["micro-batch size 2: as at the save"]


@pytest.mark.parametrize(
    "changes",
    [{"device": "cuda"}, {"tensor": 2}, {"data": 2}, {"pipeline": 2}, {"size": 3}, {"size": "2"}],
)
def test_a_size_from_elsewhere_is_found_anew(config: Config, changes: dict[str, Any]) -> None:
    saved = {"micro_batch": {**AT_TWO["micro_batch"], **changes}}
    assert FakeTrial(FASTER).choose(config, saved) == 24


@pytest.mark.parametrize("saved", [{"step": 4}, {"micro_batch": [2]}])
def test_a_save_without_a_size_leaves_it_to_be_found(config: Config, saved: dict[str, Any]) -> None:
    assert FakeTrial(FASTER).choose(config, saved) == 24


class FakeEngine:
    """Remembers what it is given, and holds memory for it as if it needed that."""

    def __init__(self) -> None:
        self.given: list[list[torch.Tensor]] = []
        self.peak = 0

    def trial(self, microbatches: Iterable[ModelInputs]) -> None:
        self.given.append([inputs.samples for inputs in microbatches])
        self.peak = 1000 + sum(len(samples) for samples in self.given[-1])


class FakeReader:
    """Gives the numbers of the samples alone."""

    def read(self, consumed: int, batch_size: int, micro_batch: int) -> Iterator[ModelInputs]:
        assert (consumed, batch_size % micro_batch) == (0, 0)
        nothing = torch.zeros(0)
        yield ModelInputs(nothing, nothing, nothing, torch.arange(micro_batch))


def make_trial(
    config: Config, dims: ParallelDims, timer: Callable[[Callable[[], None]], float]
) -> tuple[EngineTrial, FakeEngine]:
    engine = FakeEngine()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro_batch, "held_bytes", lambda device: 1000)
        patch.setattr(micro_batch, "available_bytes", lambda device, ranks: 5000 // ranks)
        trial = EngineTrial(
            config,
            launch_at(dims),
            cast(Engine, engine),
            FakeReader().read,
            group=None,
            timer=timer,
        )
    return trial, engine


def test_a_trial_warms_up_and_then_takes_the_best_of_two(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([50.0, 40.0])

    def timer(action: Callable[[], None]) -> float:
        action()
        return next(clock)

    trial, engine = make_trial(config, ParallelDims(), timer)
    monkeypatch.setattr(micro_batch, "peak_bytes", lambda device: engine.peak)
    # A step is six microbatches of four samples.
    assert trial(4) == Cost(milliseconds=10.0, held=1000, peak=1004, room=4500)
    assert [[len(samples) for samples in given] for given in engine.given] == [[4]] * 3


@pytest.mark.parametrize(
    ("size", "given", "milliseconds"),
    # On each of two data ranks twelve samples, over two ranks with two stages each: a trial of k
    # microbatches takes the time of k and half a one, and so a step of n.
    [(1, 4, 9.0 * 12.5 / 4.5 / 12), (2, 4, 9.0 * 6.5 / 4.5 / 12), (6, 2, 9.0 / 12)],
)
def test_a_pipeline_is_tried_full_and_its_idle_time_is_that_of_a_step(
    config: Config, size: int, given: int, milliseconds: float
) -> None:
    parallel = ParallelConfig(pipeline=2, chunks=2, schedule="interleaved_1f1b")
    config = replace(config, model=replace(config.model, num_layers=4), parallel=parallel)
    trial, engine = make_trial(config, ParallelDims(data=2, pipeline=2), lambda action: 9.0)
    assert trial(size).milliseconds == pytest.approx(milliseconds, rel=1e-12)
    assert [len(samples) for samples in engine.given[0]] == [size] * given


@pytest.mark.parametrize(
    ("schedule", "idle"),
    # On each of two data ranks twelve microbatches, over two ranks: a trial of two, and a step of
    # twelve, take the time of one more, or of a third of one.
    [("1f1b", 1.0), ("zero_bubble", 1 / 3)],
)
def test_idle_time_is_that_of_the_schedule(
    config: Config, schedule: ScheduleName, idle: float
) -> None:
    parallel = ParallelConfig(pipeline=2, schedule=schedule)
    model = replace(config.model, num_layers=2)
    config = replace(config, model=model, parallel=parallel)
    trial, _ = make_trial(config, ParallelDims(data=2, pipeline=2), lambda action: 9.0)
    want = 9.0 * (12 + idle) / (2 + idle) / 12
    assert trial(1).milliseconds == pytest.approx(want, rel=1e-12)


def test_fewer_microbatches_hold_fewer_samples(tmp_path: Path) -> None:
    """A step of 12 samples fills four stages with 1 or 2 at a time, not with 4: then three do."""
    config = auto(tmp_path, samples=12, global_batch_size=12)
    config = replace(
        config,
        model=replace(config.model, num_layers=4),
        parallel=ParallelConfig(pipeline=2, schedule="interleaved_1f1b", chunks=2),
    )
    assert config.micro_batch_sizes(2) == [1, 2, 6]
    trial = FakeTrial({1: 3.0, 2: 2.0, 6: 1.0}, room=127)
    launch = launch_at(ParallelDims(pipeline=2))
    # 2 x 4 samples held 20 bytes, so that 6 x 2 hold 30.
    found = choose_micro_batch(config, launch, NO_SAVE, lambda: trial, group=None)
    assert (found.size, trial.tried) == (2, [1, 2])
    trial.room = 130
    assert choose_micro_batch(config, launch, NO_SAVE, lambda: trial, group=None).size == 6


def test_a_size_needs_no_more_than_is_predicted_and_left_free(
    tmp_path: Path, figure: Figure
) -> None:
    (found,) = run_ranks(1, predict_and_try, training_config(tmp_path), CPU)
    errors = [predicted / peak - 1 for predicted, peak in found]
    figure(
        "micro-batch memory on a CPU, predicted / needed - 1", least=min(errors), most=max(errors)
    )
    assert -0.1 < min(errors) <= max(errors) < 1


def training_config(folder: Path) -> Config:
    """A run of 1 to 8 samples at a time, on data that it makes; its model is little but scores."""
    make_dataset(folder / "text", [list(range(500))] * 20)
    return Config(
        folder=folder / "run",
        model=ModelConfig(
            num_layers=2,
            hidden_size=64,
            num_heads=8,
            vocab_size=500,
            seq_length=512,
        ),
        train=TrainConfig(samples=8, global_batch_size=8, micro_batch_size="auto"),
        data=DataConfig(paths={str(folder / "text"): 1.0}),
    )


def predict_and_try(config: Config, device: torch.device) -> list[tuple[float, int]]:
    """Bytes predicted and held at most, for each size after the first."""
    groups = build_groups(ParallelDims())
    launch = Launch(0, 1, device, groups)
    engine = TorchEngine(config, groups, device, "explicit")
    data = BatchReader(config, launch, "train", config.train.samples, eod_id=None)
    trial = EngineTrial(config, launch, engine, data.read, group=None)
    costs = [trial(size) for size in config.micro_batch_sizes(1)]
    return [(last.need(2), cost.peak) for last, cost in pairwise(costs)]
