"""Runs that find their micro-batch size themselves."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.figures import Figure
from tests.integration.runs import base_argv, make_data, newest_save, run_pretrain, values

SIZES = (1, 2, 4, 8)
TENSOR_2: dict[str, Any] = {"parallel__tensor": 2, "parallel__sequence": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("micro_batch")
    make_data(folder / "text")
    return folder


def train(folder: Path, run: str, size: object, **changes: Any) -> list[str]:
    """Train on two ranks; what was told of the micro-batch size."""
    arguments = base_argv(
        folder,
        folder=folder / run,
        model__hidden_dropout=0.1,
        train__samples=48,
        train__global_batch_size=8,
        train__micro_batch_size=size,
        **changes,
    )
    result = run_pretrain(arguments, world_size=2)
    assert result.exit_code == 0
    assert result.complaints == []
    return re.findall("micro-batch size (.*)", result.stdout)


def saved_size(run: Path) -> int:
    return int(newest_save(run).state["micro_batch"]["size"])


def test_run_with_a_found_size_is_the_one_with_that_size_given(
    folder: Path, figure: Figure
) -> None:
    """Bit for bit, although it was stopped and went on."""
    (found,) = train(folder, "auto", "auto", train__stop_at_step=2, **TENSOR_2)
    size = saved_size(folder / "auto")
    assert size in SIZES
    assert found.startswith(f"{size}: the fastest of 1 (")
    assert train(folder, "auto", "auto", **TENSOR_2) == [f"{size}: as at the save"]
    assert saved_size(folder / "auto") == size

    assert train(folder, "given", size, **TENSOR_2) == []
    for name in ("loss_hex", "grad_norm_hex"):
        assert values(folder / "auto", name) == values(folder / "given", name)
    mine, theirs = newest_save(folder / "auto"), newest_save(folder / "given")
    assert mine.state == theirs.state
    assert set(mine.tensors) == set(theirs.tensors)
    for kind, name in mine.tensors:
        assert torch.equal(mine.read(kind, name), theirs.read(kind, name)), (kind, name)
    figure("micro-batch size found on two tensor ranks", told=found)


def test_run_that_goes_on_at_another_layout_finds_its_size_anew(folder: Path) -> None:
    train(folder, "moved", "auto", train__stop_at_step=2, **TENSOR_2)
    (found,) = train(folder, "moved", "auto", parallel__data=2)
    assert re.match(r"[124]: the fastest of 1 \(", found)
    assert len(values(folder / "moved", "loss")) == 6


def test_pipeline_finds_a_size_that_fills_it(folder: Path) -> None:
    (found,) = train(folder, "pipeline", "auto", parallel__pipeline=2)
    assert re.match(r"[124]: the fastest of 1 \(", found)
