"""The command ``bloom``: its verbs, what it says of them, and how soon."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron.commands.benchmark import BENCHMARKS
from megatron.commands.main import VERBS, overview, run
from megatron.errors import ConfigError
from tests.figures import Figure

ROOT = Path(__file__).parents[3]
OLD = {
    "collect_corpus": "corpus",
    "convert_checkpoint": "export",
    "generate": "generate",
    "migrate_config": "migrate",
    "plan": "plan",
    "preprocess_data": "prepare",
    "report": "report",
    "train_tokenizer": "tokenizer",
}
"""What the tools of a checkout are the verbs of."""

SLOW = ("matplotlib", "tokenizers", "torch", "torchao", "transformers")
MOST_SECONDS = 1.0


def bloom(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return started("-m", "megatron.commands", *words, cwd=cwd)


def started(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_verb_is_there_and_told() -> None:
    for name, verb in VERBS.items():
        assert find_spec(verb.module) is not None
        assert re.search(rf"^  {name} +{re.escape(verb.does)}$", overview(), re.M)


def test_what_is_no_verb_is_told_what_may_be_meant() -> None:
    with pytest.raises(ConfigError, match="^bloom reprot: is not a verb; did you mean report"):
        run(["reprot"])
    with pytest.raises(ConfigError, match="^bloom qqq: is not a verb; the verbs are corpus, "):
        run(["qqq"])


def test_versions_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    run(["version"])
    told = capsys.readouterr().out
    assert re.fullmatch(r"bloom \S+\ntorch \d\S+\nPython 3\.\d+\.\S+\n", told)
    run(["--version"])
    assert capsys.readouterr().out == told


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_is_there_at_once(verb: str | None, tmp_path: Path, figure: Figure) -> None:
    words = [*([] if verb is None else [verb]), "--help"]
    program = (
        "import sys, time\nfrom megatron.commands.main import main\n"
        f"try: main({words!r})\n"
        "finally:\n"
        "    print(time.process_time(), *sys.modules, file=sys.stderr)\n"
    )
    done = started("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: bloom {verb or 'VERB'}")
    assert "bloom" in done.stdout.partition("\n")[2], "it has an example"
    (line,) = done.stderr.splitlines()
    seconds, *modules = line.split()
    figure(f"bloom {' '.join(words)}", cpu_seconds=float(seconds))
    assert float(seconds) < MOST_SECONDS
    # The tokenizer is trained by a package that is small.
    assert {name for name in modules if name in SLOW} <= {"tokenizers"}


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = bloom("generate", "--promt", "a", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: bloom generate: ")


@pytest.mark.parametrize("how", ["file", "module"])
@pytest.mark.parametrize("name", OLD)
def test_old_names_start_the_same(name: str, how: str) -> None:
    entry = [f"tools/{name}.py"] if how == "file" else ["-m", f"tools.{name}"]
    done = started(*entry, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: bloom {OLD[name]} ")


def test_benchmarks_are_those_there_are() -> None:
    folder = ROOT / "megatron" / "benchmarks"
    with_main = {
        path.stem
        for path in folder.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    }
    assert set(BENCHMARKS) == with_main


def test_a_benchmark_is_run_by_its_name(tmp_path: Path) -> None:
    done = bloom("benchmark", "page", "--output", str(tmp_path / "page.md"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.md").read_text().startswith("#")
    assert "did you mean head?" in bloom("benchmark", "haed").stderr
