"""A rank that stops answering ends the other, whose GPU waits for its GPU, with code 8."""

from pathlib import Path

import pytest
import torch

from tests.figures import Figure
from tests.integration.runs import base_argv, make_data, run_pretrain
from tests.integration.test_stalls import MOST_OVER, PEER_LOST, Stall

WAIT = 30.0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("axis", ["tensor", "data", "pipeline"])
@pytest.mark.parametrize("place", ["step 2", "the evaluation after step 2"])
def test_stalled_rank_ends_the_other_in_time(
    place: str, axis: str, rank: int, tmp_path: Path, figure: Figure
) -> None:
    """Not by NCCL's watchdog, which would abort it (-6)."""
    make_data(tmp_path / "text")
    stall = Stall(axis, place, rank, passed=0, stopped=tmp_path / "stopped")
    argv = base_argv(
        tmp_path,
        launch__device="cuda",
        launch__timeout=WAIT,
        data__split=[0.8, 0.2, 0.0],
        train__dtype="fp32",
        train__eval_interval=2,
        train__eval_samples=4,
        **{f"parallel__{axis}": 2},
    )
    result = run_pretrain(
        argv, world_size=2, fault=stall, stalled=[rank], first_ends_all=False, timeout=180
    )
    assert result.exit_codes[1 - rank] == PEER_LOST, result.stderr
    assert f"did not answer in {place}" in result.stderr
    overrun = result.ended - float(stall.stopped.read_text()) - WAIT
    figure("stalled rank on GPUs", overrun_seconds=overrun)
    assert overrun < MOST_OVER
