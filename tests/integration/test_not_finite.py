"""Infinities and NaNs end a run with code 6, are named, and are in no save.

A number of the state is spoiled on one rank, at the end of a step, behind the program's back.
"""

import math
import signal
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate, product
from pathlib import Path
from random import Random
from typing import Any

import pytest

from megatron.engine.base import Engine, StepResult
from megatron.training import trainer
from megatron.training.saving import CHECKPOINTS
from tests.figures import Figure
from tests.integration.runs import (
    Fault,
    Result,
    base_argv,
    make_data,
    newest_save,
    run_pretrain,
    values,
)

STEPS = 6
KINDS = ("weight", "exp_avg", "exp_avg_sq")
VALUES = (math.nan, math.inf, -math.inf)


@dataclass(frozen=True)
class Spoil:
    """After ``step``, a number of the ``kind`` of some parameter on ``rank`` becomes ``value``."""

    rank: int
    kind: str
    step: int
    value: float
    seed: int = 0

    def arm(self) -> None:
        build = trainer.build_engine

        def build_and_arm(*args: Any) -> Engine:
            engine = build(*args)
            train_step, steps = engine.train_step, 0

            def step_and_spoil(*args: Any) -> StepResult:
                nonlocal steps
                result = train_step(*args)
                steps += 1
                if steps == self.step:
                    self._spoil(engine)
                return result

            setattr(engine, "train_step", step_and_spoil)  # noqa: B010
            return engine

        setattr(trainer, "build_engine", build_and_arm)  # noqa: B010

    def _spoil(self, engine: Engine) -> None:
        held = [state for state in engine.state() if state.kind == self.kind and state.boxes]
        random = Random(self.seed)
        tensor = random.choice(random.choice(held).boxes).tensor
        tensor[tuple(random.randrange(size) for size in tensor.shape)] = self.value


LAYOUTS: list[dict[str, object]] = [
    {},
    {"parallel__tensor": 2},
    {"parallel__data": 2},
    {"parallel__data": 2, "parallel__zero": 1},
    {"parallel__data": 2, "parallel__zero": 3},
    {"parallel__pipeline": 2},
]
if find_spec("deepspeed") is not None:
    LAYOUTS += [
        {"engine__name": "deepspeed", "parallel__data": 2, "parallel__zero": 2},
        {"engine__name": "deepspeed", "parallel__data": 2, "parallel__zero": 3},
    ]


def world_size(layout: dict[str, object]) -> int:
    axes = ("parallel__tensor", "parallel__data", "parallel__pipeline")
    return math.prod(int(str(layout.get(axis, 1))) for axis in axes)


CASES = [
    (layout, Spoil(rank, kind, step, VALUES[number % 3], number))
    for number, (layout, kind, step, rank) in enumerate(
        (layout, kind, step, rank)
        for layout, kind, step in product(LAYOUTS, KINDS, (3, 4, STEPS))
        for rank in range(world_size(layout))
    )
]
SAMPLE = Random(5).sample(CASES, 4)


@pytest.mark.parametrize(
    ("layout", "spoil"),
    [
        *SAMPLE,
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in CASES if case not in SAMPLE),
    ],
    ids=str,
)
def test_a_spoiled_state_is_named_and_not_saved(
    layout: dict[str, object], spoil: Spoil, tmp_path: Path, figure: Figure
) -> None:
    make_data(tmp_path / "text")
    argv = base_argv(
        tmp_path,
        **{
            "train__samples": 4 * STEPS,
            "train__dtype": "fp32",
            "checkpoint__save_interval": 2,
            "checkpoint__keep_last": 1,
            **layout,
        },
    )
    result = run_pretrain(argv, world_size=world_size(layout), fault=spoil, timeout=120)
    assert result.exit_code == 6
    (message,) = result.complaints
    # A moment spoils the weight of its parameter in the next step, before it is looked at.
    kinds = (spoil.kind, "weight")
    assert any(f"the {kind} of language_model." in message for kind in kinds), message
    assert f"on rank {spoil.rank}" in message or "on ranks 0, 1" in message
    folders = [path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir()]
    # Saved every two steps, and the one before it removed.
    assert folders == [f"step-{(spoil.step - 1) // 2 * 2:08d}"]
    figure("spoiled runs", cases=len(CASES), seconds=result.seconds)

    again = run_pretrain(argv, world_size=world_size(layout), timeout=120)
    assert again.exit_code == 0
    assert len(values(tmp_path / "run", "loss")) == STEPS
    assert newest_save(tmp_path / "run").state["step"] == STEPS


def train_fp16(folder: Path, initial: float, **changes: Any) -> Result:
    """A run of twelve steps, with a save after every second one."""
    if not (folder / "text.idx").exists():
        make_data(folder / "text")
    defaults = {
        "train__samples": 48,
        "train__dtype": "fp16",
        "train__loss_scale__initial": initial,
        "train__loss_scale__hysteresis": 1,
        "checkpoint__save_interval": 2,
    }
    fault = changes.pop("fault", None)
    return run_pretrain(base_argv(folder, **{**defaults, **changes}), fault=fault)


def saves(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / CHECKPOINTS).glob("step-*"))


@pytest.mark.parametrize("hysteresis", [1, 2, 20])
def test_a_run_that_only_skips_ends_with_code_6(tmp_path: Path, hysteresis: int) -> None:
    changes = {"train__loss_scale__hysteresis": hysteresis, "log__interval": 1}
    result = train_fp16(tmp_path, 2.0**60, **changes)
    assert result.exit_code == 6
    assert saves(tmp_path) == []
    scales = [2.0**60 / 2 ** max(0, step - hysteresis + 1) for step in range(12)]
    assert values(tmp_path / "run", "loss_scale") == scales
    assert values(tmp_path / "run", "skipped_steps") == list(range(1, 13))
    assert all(values(tmp_path / "run", "skipped"))
    assert f"| scale {scales[6]:g} skipped 7 |" in result.stdout
    *warnings, error = result.complaints
    assert [line.split(" is not saved")[0].split()[-2:] for line in warnings] == [
        ["step", str(step)] for step in (2, 4, 6, 8, 10, 12)
    ]
    assert "nothing is saved yet; train longer, or with a lower train.loss_scale.initial" in error


def test_a_start_that_only_skips_leaves_the_last_good_save_the_newest(tmp_path: Path) -> None:
    changes = {"checkpoint__keep_last": 1}
    first = train_fp16(tmp_path, 1.0, train__dtype="fp32", train__stop_at_step=4, **changes)
    assert first.exit_code == 0
    result = train_fp16(tmp_path, 2.0**60, **changes)
    assert result.exit_code == 6
    assert "the newest save is of step" in result.complaints[-1]
    # The first overflows may be in order; what is saved then is as good as before.
    (newest,) = saves(tmp_path)
    assert newest in ("step-00000004", "step-00000006")
    assert train_fp16(tmp_path, 1.0, train__dtype="fp32", **changes).exit_code == 0


def test_skipped_steps_are_counted_over_all_starts(tmp_path: Path) -> None:
    """From a scale that the first steps find to be too high."""
    assert train_fp16(tmp_path, 2.0**24, train__stop_at_step=8).exit_code == 0
    assert train_fp16(tmp_path, 2.0**24).exit_code == 0
    skipped = values(tmp_path / "run", "skipped_steps")
    scales = values(tmp_path / "run", "loss_scale")
    assert 0 < skipped[7] < 8
    assert skipped == list(accumulate(values(tmp_path / "run", "skipped")))
    assert scales[-1] == 2.0 ** (24 - skipped[-2])
    assert newest_save(tmp_path / "run").state["engine"]["skipped_steps"] == skipped[-1]


def test_a_stop_before_the_first_update_needs_no_save(tmp_path: Path) -> None:
    """Starting again finds the same scale, and goes on."""
    stopped = train_fp16(tmp_path, 2.0**24, fault=Fault(1, signal.SIGTERM))
    assert stopped.exit_code == 10
    assert "stopped on request after step 1, which needs no save" in stopped.stdout
    assert saves(tmp_path) == []
    assert train_fp16(tmp_path, 2.0**24).exit_code == 0
