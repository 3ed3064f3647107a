"""The recipes of docs/extending.md apply to the tree, and do what they say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks, sections

PAGE = (ROOT / "docs" / "extending.md").read_text()

# One process for all recipes: importing torch is most of it.
CHECKS = """
from dataclasses import replace
from pathlib import Path

import torch

from megatron.config import ModelConfig, load_config
from megatron.data.corpus import find_files, read_records
from megatron.model.activations import activate
from megatron.model.alibi import alibi_slopes
from megatron.model.attention import AttentionBias, attention
from megatron.model.flops import count_parameters
from megatron.training.metrics import StepMetrics, log_line

shape = dict(num_layers=1, hidden_size=32, num_heads=4, vocab_size=64, seq_length=16)
words = [word for name, value in shape.items() for word in (f"--model.{name}", str(value))]
words += ["--folder", "run", "--train.samples", "8", "--train.global_batch_size", "8"]


def option():
    assert load_config(words).log.loss_digits == 4
    config = load_config([*words, "--log.loss_digits", "2"])
    step = StepMetrics(
        step=1, consumed_samples=8, consumed_tokens=128, loss=1.23456, learning_rate=0.1,
        grad_norm=1, global_batch_size=8, skipped=False, step_seconds=1, tokens_per_second=128,
        tflops_per_device=1, mfu=None, elapsed_seconds=1, peak_memory_bytes=1,
    )
    digits = config.log.loss_digits
    assert "loss 1.23 " in log_line(step, total_steps=1, total_samples=8, loss_digits=digits)


def activation():
    config = ModelConfig(**shape, activation="relu2")
    assert count_parameters(config) == count_parameters(ModelConfig(**shape))
    x = torch.tensor([-1.0, 0.5, 2.0])
    assert activate(x, torch.tensor(1.0), "relu2").tolist() == [0, 2.25, 9]


def backend():
    assert ModelConfig(**shape, attention_backend="plain").attention_backend == "plain"
    documents = torch.tensor([[0] * 9 + [1] * 14]).expand(2, -1)
    biases = [
        AttentionBias(),
        AttentionBias(slopes=alibi_slopes(4)),
        AttentionBias(documents, alibi_slopes(4)),
    ]
    for bias in biases:
        found = []
        for name in ("explicit", "plain"):
            torch.manual_seed(0)
            leaves = [torch.randn(2, 4, 23, 8).double().requires_grad_() for _ in range(3)]
            out = attention(*leaves, bias, backend=name)
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for wanted, got in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def format():
    Path("texts").mkdir()
    Path("texts/a.md").write_text("# Head")
    (record,) = read_records(find_files([Path("texts")]))
    assert record.text("text") == "# Head"


option(), activation(), backend(), format()
print("all recipes hold")
"""


def test_each_recipe_has_a_diff() -> None:
    found = {head: [block.language for block in blocks(text)] for head, text in recipes().items()}
    assert len(found) == 4
    assert set(map(tuple, found.values())) == {("diff",)}


def recipes() -> dict[str, str]:
    return sections(PAGE)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with all recipes applied."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("mpu", "megatron"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for head, text in recipes().items():
        diff = "".join(block.text for block in blocks(text))
        # Not a part of a repository that the folder may lie in.
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(copy.parent)}
        done = subprocess.run(
            ["git", "apply", "-"],
            cwd=copy,
            env=environment,
            input=diff,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{head}: correct its diff: {done.stderr}"
    return copy


@pytest.mark.slow
def test_recipes_do_what_they_say(extended: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(extended)}
    done = subprocess.run(
        [sys.executable, "-c", CHECKS],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all recipes hold\n"


def test_recipes_are_formatted(extended: Path) -> None:
    """As ``ruff format`` has the lines, so that a diff can be kept as it is."""
    ruff = Path(sys.executable).with_name("ruff")
    config = ROOT / "pyproject.toml"
    for words in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [ruff, *words, "--config", config, "megatron"],
            cwd=extended,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
