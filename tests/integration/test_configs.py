"""The example configs are what they say, and a dry run accepts them on any machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.config import Config, load_config
from megatron.model.flops import count_parameters
from megatron.model.stages import build_stages
from megatron.planning.count import count
from tests.figures import Figure
from tests.integration.runs import base_argv, run_pretrain

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"

PUBLISHED = {
    "bloom-560m": 559_214_592,
    "bloom-1b1": 1_065_314_304,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
}


def load(name: str) -> Config:
    return load_config(["--config", str(CONFIGS / f"{name}.yaml")])


def test_every_config_of_a_bloom_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("bloom-*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_has_the_published_number_of_parameters(name: str) -> None:
    assert count_parameters(load(name).model) == PUBLISHED[name]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "bloom-176b"])
def test_small_bloom_fits_on_eight_gpus(name: str) -> None:
    found = count(load(name))
    assert found.parameters == PUBLISHED[name]
    assert found.dims.world_size == 8
    found.check_fits(80)


def test_stages_of_176b_are_those_of_its_run() -> None:
    config = load("bloom-176b")
    stages = build_stages(config.model, config.parallel)
    assert [len(stage.layers) for stage in stages] == [5, *[6] * 10, 5]


def test_rank_of_176b_holds_what_bloom_held() -> None:
    found = count(load("bloom-176b"))
    assert found.dims.world_size == 384
    hidden, tensor, data = 14336, 4, 8
    # Of each layer on one rank: its part of the matrices and of the biases of column-parallel
    # layers; norms and the other biases whole.
    layer = 12 * hidden**2 // tensor + 7 * hidden // tensor + 6 * hidden
    for rank in found.ranks[1:-1]:
        # bf16 weights, fp32 gradients, fp32 weights and two moments cut over the data ranks.
        assert rank.state.weights == 2 * 6 * layer
        assert rank.state.gradients == 4 * 6 * layer
        assert rank.state.optimizer == 12 * 6 * layer // data
    # The earlier the stage, the more microbatches it holds: one hidden state for each layer.
    kept = [rank.activations for rank in found.ranks[1:-1]]
    microbatch = 6 * 2 * 2048 * hidden * 2
    for earlier, later in zip(kept, kept[1:], strict=False):
        assert earlier - later == pytest.approx(microbatch, rel=0.1)


def test_dry_run_of_176b_is_quick_and_small(figure: Figure, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "pretrain_bloom.py"), "--dry_run", "80"]
    started = time.monotonic()
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(
            [*command, "--config", str(CONFIGS / "bloom-176b.yaml")], cwd=tmp_path, stdout=out
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds, gigabytes = time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert "176,247,271,424 parameters" in (tmp_path / "out").read_text()
    figure("dry run of 176B at 4 x 12 x 8", seconds=seconds, peak_rss_gb=gigabytes)
    assert seconds < 60
    assert gigabytes < 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_dry_run_reads_and_writes_nothing(tmp_path: Path) -> None:
    argv = base_argv(tmp_path, data__tokenizer=tmp_path / "no tokenizer")
    result = run_pretrain([*argv, "--dry_run"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_only_one_of_several_ranks_reports(tmp_path: Path) -> None:
    result = run_pretrain([*base_argv(tmp_path), "--dry_run"], world_size=2)
    assert result.exit_code == 0
    assert result.stdout.count("parameters\n") == 1


def test_what_does_not_fit_ends_with_one_message(tmp_path: Path) -> None:
    result = run_pretrain([*base_argv(tmp_path), "--dry_run", "0.0001"])
    assert result.exit_code == 2
    assert result.stdout.count(" no\n") == 1
    (line,) = result.stderr.splitlines()
    assert "rank 0 of the pipeline (layers E 0-1 H)" in line
    assert "--dry_run 0.0001" in line


def test_layout_that_does_not_divide_ends_before_anything_is_built(tmp_path: Path) -> None:
    result = run_pretrain([*base_argv(tmp_path, parallel__tensor=3), "--dry_run"])
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "parallel.tensor" in line
