"""docs/metrics.md has every field that is written, and no other."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import ProcessGroup

from megatron.config import ModelConfig
from megatron.engine.base import StepResult
from megatron.launch import Launch
from megatron.model.flops import flops_per_token
from megatron.training.metrics import (
    METRICS_FILE,
    EvalMetrics,
    MetricsWriter,
    StepMetrics,
    eval_line,
    log_line,
)
from megatron.training.progress import Progress
from megatron.training.reporter import Reporter
from mpu import ParallelDims, ParallelGroups
from tests.docs.pages import ROOT, blocks, rows
from tests.megatron.training.sample import CPU, make_config

PAGE = (ROOT / "docs" / "metrics.md").read_text()
STEP = StepMetrics(
    step=80,
    consumed_samples=20_480,
    consumed_tokens=41_943_040,
    loss=3.25,
    learning_rate=3e-4,
    grad_norm=0.5,
    global_batch_size=256,
    skipped=False,
    step_seconds=2.0,
    tokens_per_second=262_144.0,
    tflops_per_device=151.2,
    mfu=0.485,
    elapsed_seconds=160.0,
    peak_memory_bytes=2**30,
)
EVAL = EvalMetrics(step=80, consumed_samples=20_480, split="valid", loss=2.0, bits_per_byte=0.75)


def fields(head: str) -> set[str]:
    """The fields in the first column of the tables called ``head``."""
    return {name for cells in rows(PAGE, head) for name in re.findall(r"`([^`]+)`", cells[0])}


@pytest.fixture
def written(tmp_path: Path, single_group: ProcessGroup) -> dict[str, dict[str, Any]]:
    """A line of each kind, as it is in the file."""
    launch = Launch(0, 1, CPU, ParallelGroups(ParallelDims(), *[single_group] * 5))
    config = make_config(tmp_path, data={"paths": {str(tmp_path / "text"): 1.0}})
    config.folder.mkdir(exist_ok=True)
    reporter = Reporter(config, launch, Progress(), bytes_per_token=4.0)
    reporter.start()
    progress = Progress().after(4, config.model.seq_length)
    reporter.step(progress, StepResult(3.5, 1.25), 1e-3, 4, 0.5)
    reporter.evaluation(progress, "valid", 2.0)
    reporter.saved(progress, tmp_path)
    reporter.close()
    lines = [json.loads(line) for line in (config.folder / METRICS_FILE).open()]
    return {line["event"]: line for line in lines}


def test_page_has_the_fields_of_the_file_and_no_others(
    written: dict[str, dict[str, Any]],
) -> None:
    every = fields("every")
    assert {event: set(line) for event, line in written.items()} == {
        event: every | fields(event) for event in ("start", "step", "eval", "save")
    }


def test_page_has_the_tags_of_tensorboard_and_no_others(tmp_path: Path) -> None:
    told: list[str] = []

    class Board:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            told.append(tag)

    writer = MetricsWriter(tmp_path, tensorboard=False, enabled=True, resume_step=0)
    vars(writer)["_board"] = Board()
    writer.write_step(replace(STEP, loss_scale=1.0))
    writer.write_eval(EVAL)
    assert fields("tag") == set(told)


def test_lines_of_the_page_are_those_of_a_run() -> None:
    made = [log_line(STEP, total_steps=320, total_samples=81_920), eval_line(EVAL)]
    assert next(blocks(PAGE)).text.splitlines() == made


def test_page_has_the_parts_of_the_line_and_no_others() -> None:
    line = replace(STEP, loss_scale=1.0, skipped=True)
    made = log_line(line, total_steps=320, total_samples=81_920)
    words = set(re.findall(r"[A-Za-z/]{2,}", made.replace("(skipped updates)", "")))
    # The M of millions is no part, nor the e of an exponent.
    assert fields("part") == words


def test_formula_of_the_page_is_what_is_counted() -> None:
    assert "3 (L (8 h^2 + 4 h f + 2 s h) + 2 h V)" in PAGE
    layers, h, s, vocabulary = 3, 32, 64, 96
    config = ModelConfig(
        num_layers=layers, hidden_size=h, num_heads=4, vocab_size=vocabulary, seq_length=s
    )
    f = config.ffn_size
    counted = 3 * (layers * (8 * h**2 + 4 * h * f + 2 * s * h) + 2 * h * vocabulary)
    assert counted == flops_per_token(config, "causal")
