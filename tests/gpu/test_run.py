"""Engine and trainer on GPUs: the numbers of a CPU, and a CPU that waits once a step.

The bodies take any device. A few of them run on the CPU too, which shows that they are sound; what
they assert of waiting only a GPU can show. Layouts of several ranks need as many GPUs, and go
through NCCL.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config import ScheduleName
from megatron.engine.base import StepResult
from megatron.engine.torch_engine import TorchEngine
from megatron.errors import ReplicaError
from megatron.training.replicas import check_replicas
from mpu import build_groups
from tests.distributed import run_ranks
from tests.figures import Figure
from tests.integration.runs import base_argv, make_data, records, run_pretrain, values
from tests.megatron.engine.device_runs import read, save_and_load
from tests.megatron.engine.training import Layout, make_config
from tests.megatron.training.test_replicas import flip_bit

Kind: TypeAlias = Literal["cpu", "cuda"]

STEPS = 3
TOLERANCE = 1e-9
"""In float64; a GPU adds up in another order, some of it in a random one."""

BASE = Layout(micro_batch=2, num_layers=4)
ON_ONE = [replace(BASE, zero=zero) for zero in (0, 1, 2, 3)]
ON_ONE += [replace(BASE, recompute="full"), replace(BASE, recompute="selective", tied=False)]
ON_TWO = [replace(BASE, data=2, zero=zero) for zero in (0, 1, 2, 3)]
ON_TWO += [replace(BASE, tensor=2, sequence=sequence) for sequence in (False, True)]
ON_TWO += [
    replace(BASE, pipeline=2, schedule=name, chunks=2 if name == "interleaved_1f1b" else 1)
    for name in get_args(ScheduleName)
]
ON_FOUR = [
    replace(BASE, tensor=2, pipeline=2, sequence=True),
    replace(BASE, pipeline=2, data=2, zero=1),
    replace(BASE, tensor=2, data=2, zero=3, sequence=True),
]


def on_gpus(count: int) -> list[pytest.MarkDecorator]:
    there = torch.cuda.device_count()
    return [pytest.mark.gpu, pytest.mark.skipif(there < count, reason=f"needs {count} GPUs")]


def cases(layouts: Sequence[Layout], on_cpu: Sequence[Layout]) -> list[Any]:
    """Layouts on GPUs, and some of them on the CPU."""
    return [
        *(
            pytest.param(it, "cuda", marks=on_gpus(it.world_size), id=f"cuda, {it}")
            for it in layouts
        ),
        *(pytest.param(it, "cpu", id=f"cpu, {it}") for it in on_cpu),
    ]


def device_of(kind: Kind) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(device)
    return device


@contextmanager
def one_read_allowed(device: torch.device) -> Iterator[list[str]]:
    """Let all that waits for a GPU fail but ``tolist``, of whose calls a list is kept."""
    reads: list[str] = []
    tolist = Tensor.tolist

    def read_once(tensor: Tensor) -> Any:
        if not tensor.is_cuda:
            return tolist(tensor)
        reads.append(str(tuple(tensor.shape)))
        torch.cuda.set_sync_debug_mode("default")
        try:
            return tolist(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "tolist", read_once)
        with waiting_forbidden() if device.type == "cuda" else nullcontext():
            yield reads


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@dataclass(frozen=True)
class Outcome:
    """What one rank saw.

    Attributes:
        results: of all steps; those from the second on must not wait.
        reads: of the steps that must not wait.
        resumed: the step after the last, by an engine that was loaded from a save.
    """

    results: list[StepResult]
    reads: list[str]
    evaluation: float
    resumed: StepResult


def train_on(layout: Layout, kind: Kind, folder: Path) -> Outcome:
    """Step, evaluate, compare, save and go on from that."""
    config, device = make_config(layout), device_of(kind)
    groups = build_groups(config.layout(dist.get_world_size()))
    engine, other = (TorchEngine(config, groups, device, "blocked") for _ in range(2))

    def step(engine: TorchEngine, number: int) -> StepResult:
        return engine.train_step(read(config, groups, device, number), lr=1e-2)

    # The first one compiles kernels and meets the other GPUs.
    results = [step(engine, 0)]
    with one_read_allowed(device) as reads:
        results += [step(engine, number) for number in range(1, STEPS)]
    evaluation = engine.evaluate(read(config, groups, device, STEPS))
    check_replicas(engine, groups)
    save_and_load(engine, folder, other)
    check_replicas(other, groups)
    results.append(step(engine, STEPS))
    return Outcome(results, reads, evaluation, step(other, STEPS))


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Outcome]:
    """What one process on the CPU sees, with tied embeddings and without."""
    folder = tmp_path_factory.mktemp("wanted")
    return {
        tied: run_ranks(1, train_on, replace(BASE, tied=tied), "cpu", folder / str(tied))[0]
        for tied in (True, False)
    }


@pytest.mark.parametrize(
    ("layout", "kind"),
    cases([*ON_ONE, *ON_TWO, *ON_FOUR], [replace(BASE, data=2, zero=1)]),
)
def test_engine_gives_the_numbers_of_one_cpu_and_waits_once_a_step(
    layout: Layout, kind: Kind, wanted: dict[bool, Outcome], tmp_path: Path, figure: Figure
) -> None:
    want = wanted[layout.tied]
    ranks: list[Outcome] = run_ranks(layout.world_size, train_on, layout, kind, tmp_path)
    for got in ranks:
        pairs = [*zip(got.results, want.results, strict=True), (got.resumed, want.resumed)]
        errors = [
            abs(a / b - 1)
            for mine, theirs in pairs
            for a, b in ((mine.loss, theirs.loss), (mine.grad_norm, theirs.grad_norm))
        ]
        figure(f"engine on {kind} against one CPU", error=max(errors), reads=len(got.reads))
        assert max(errors) < TOLERANCE
        assert abs(got.evaluation / want.evaluation - 1) < TOLERANCE
        assert len(got.reads) == (STEPS - 1 if kind == "cuda" else 0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("layout", "kind"),
    cases([replace(BASE, zero=1), *ON_TWO, *ON_FOUR], [replace(BASE, num_layers=1)]),
)
def test_low_precision_waits_once_a_step_too(layout: Layout, kind: Kind, dtype: Any) -> None:
    for results, reads in run_ranks(layout.world_size, train_low, layout, kind, dtype):
        assert all(math.isfinite(result.loss) for result in results)
        assert reads == (STEPS - 1 if kind == "cuda" else 0)


def train_low(layout: Layout, kind: Kind, dtype: Any) -> tuple[list[StepResult], int]:
    config, device = make_config(layout, dtype), device_of(kind)
    groups = build_groups(config.layout(dist.get_world_size()))
    engine = TorchEngine(config, groups, device, "blocked")
    results = [engine.train_step(read(config, groups, device, 0), lr=1e-3)]
    with one_read_allowed(device) as reads:
        for number in range(1, STEPS):
            results.append(engine.train_step(read(config, groups, device, number), lr=1e-3))
    check_replicas(engine, groups)
    return results, len(reads)


TIED = replace(BASE, pipeline=2, data=2, zero=1)
"""Of the word embedding, which both stages have, some ranks hold nothing."""


@pytest.mark.parametrize(
    ("layout", "kind"),
    cases([replace(BASE, data=2), TIED], [replace(BASE, data=2, num_layers=1, micro_batch=4)]),
)
def test_a_flipped_bit_is_found_on_every_rank(layout: Layout, kind: Kind) -> None:
    messages = run_ranks(layout.world_size, flip_and_check, layout, kind)
    assert len(set(messages)) == 1
    assert "replicas are out of sync" in messages[0]


def flip_and_check(layout: Layout, kind: Kind) -> str:
    config, device = make_config(layout, "fp32"), device_of(kind)
    groups = build_groups(config.layout(dist.get_world_size()))
    engine = TorchEngine(config, groups, device, "blocked")
    check_replicas(engine, groups)
    if dist.get_rank() == dist.get_world_size() - 1:
        tied = [
            it for it in engine.state() if "embedding" in it.replicated_over or layout.zero == 0
        ]
        flip_bit(next(it for it in tied if it.boxes).boxes[0].tensor)
    with pytest.raises(ReplicaError) as caught:
        check_replicas(engine, groups)
    return str(caught.value)


def forbid_waits() -> None:
    """In every process of a run: from the second step on, nothing but one read may wait."""
    train_step, steps = TorchEngine.train_step, [0]

    def watched(engine: TorchEngine, microbatches: Any, lr: float) -> StepResult:
        steps[0] += 1
        if steps[0] == 1:
            return train_step(engine, microbatches, lr)
        with one_read_allowed(engine.device):
            return train_step(engine, microbatches, lr)

    setattr(TorchEngine, "train_step", watched)  # noqa: B010


RUNS: list[dict[str, Any]] = [
    {},
    {"parallel__data": 2, "parallel__zero": 1},
    {"parallel__data": 2, "parallel__zero": 3},
    {"parallel__tensor": 2, "parallel__sequence": True},
    {"parallel__pipeline": 2},
    {"parallel__pipeline": 2, "parallel__data": 2, "parallel__zero": 1},
]


def _ranks(layout: dict[str, Any]) -> int:
    axes = ("parallel__tensor", "parallel__pipeline", "parallel__data")
    return math.prod(int(layout.get(axis, 1)) for axis in axes)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        *(pytest.param(it, "cuda", marks=on_gpus(_ranks(it)), id=f"cuda {it}") for it in RUNS),
        pytest.param(RUNS[1], "cpu", id="cpu"),
    ],
)
def test_a_run_evaluates_saves_stops_and_goes_on(
    layout: dict[str, Any], kind: Kind, tmp_path: Path
) -> None:
    make_data(tmp_path / "text")
    arguments = {
        "launch__device": kind,
        "train__dtype": "bf16",
        "train__samples": 48,
        "train__global_batch_size": 8,
        "train__micro_batch_size": "auto",
        "train__eval_interval": 3,
        "train__eval_samples": 8,
        "train__replica_check_interval": 1,
        "data__split": [0.8, 0.2, 0.0],
        "checkpoint__save_interval": 2,
        **layout,
    }
    for changes in ({"train__stop_at_step": 3}, {}):
        result = run_pretrain(
            base_argv(tmp_path, **{**arguments, **changes}),
            world_size=_ranks(layout),
            prepare=forbid_waits,
            timeout=120,
        )
        assert result.exit_code == 0, result.stderr
    losses = values(tmp_path / "run", "loss")
    assert len(losses) == 6
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert len(records(tmp_path / "run", "eval")) >= 2
