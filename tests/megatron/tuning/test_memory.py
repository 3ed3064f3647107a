"""What is told of memory is what was taken, and what the machine or its control group has."""

import os
from pathlib import Path

import pytest
import torch

from megatron.tuning import memory
from megatron.tuning.memory import available_bytes, forget_peak, held_bytes, peak_bytes
from tests.distributed import run_ranks

CPU = torch.device("cpu")
SIZE = 256 * 2**20


def test_memory_is_held_as_long_as_a_tensor_lives_and_remembered() -> None:
    run_ranks(1, take_and_give_back)


def take_and_give_back() -> None:
    before = held_bytes(CPU)
    tensor = torch.ones(SIZE, dtype=torch.uint8)
    held = held_bytes(CPU)
    assert SIZE <= held - before < 1.1 * SIZE
    del tensor
    forget_peak(CPU)
    assert held_bytes(CPU) < held - 0.9 * SIZE
    # Linux brings the two up to date at different times.
    assert peak_bytes(CPU) == pytest.approx(held, abs=0.1 * SIZE)


@pytest.mark.parametrize(("text", "is_limit"), [("1000000\n", True), ("max\n", False)])
def test_ranks_share_the_machine_or_its_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, is_limit: bool
) -> None:
    (tmp_path / "limit").write_text(text)
    limits = (tmp_path / "none", tmp_path / "limit")
    monkeypatch.setattr(memory, "_GROUP_LIMITS", limits)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available_bytes(CPU, 4) == (1_000_000 if is_limit else machine) // 4
