"""Damage to any file of a run folder is named, or does no harm; none is silent.

A run is killed twice and left as it is: with saves, metrics and those that were cut off, configs,
TensorBoard's files, the caches of the data, and a lock. Then a program flips one bit of a file,
cuts it short or removes it, and starts the run again. It has to end in one of three ways:

    named      exit code 3, 4 or 5 with the file in the message, and the folder as it was, but for
               the lock of the killed run
    warned     the run goes on, after a warning with the file
    harmless   the run goes on

Where it goes on, every step that the metrics tell of, and the bytes of the last save, are those of
a run that was left alone. A start that was refused goes on with ``checkpoint.skip_damaged``.
"""

import shutil
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import pytest

from megatron.hashing import hash_file
from megatron.training.run_lock import LOCK_FILE
from tests.figures import Figure
from tests.integration.machines import be_on
from tests.integration.runs import (
    Fault,
    Result,
    base_argv,
    contents,
    make_data,
    make_tokenizer,
    records,
    run_pretrain,
)

STEPS = 6
REFUSED = (3, 4, 5)
CASES = 300
KINDS = ("flip", "cut", "remove")
FOLDERS = ("checkpoints", "checkpoints/step-00000002", "checkpoints/step-00000004")


@dataclass(frozen=True)
class Damage:
    """What is done to the file or folder ``path`` of a run; ``at`` is 0 to 1."""

    path: str
    kind: str
    at: float

    def __str__(self) -> str:
        return f"{self.kind} {self.path} at {self.at:.3f}"

    def apply(self, run: Path) -> None:
        path = run / self.path
        if path.is_dir():
            shutil.rmtree(path)
        elif self.kind == "remove":
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            if self.kind == "flip":
                bit = int(self.at * 8 * len(content))
                content[bit // 8] ^= 1 << bit % 8
            else:
                del content[int(self.at * len(content)) :]
            path.write_bytes(content)


def start(data: Path, run: Path, *options: str, fault: Fault | None = None) -> Result:
    """Start the run in the folder ``run`` on the data of the folder ``data``."""
    arguments = base_argv(
        data,
        folder=run,
        model__num_layers=1,
        model__hidden_size=8,
        model__num_heads=2,
        model__seq_length=16,
        model__hidden_dropout=0.1,
        data__tokenizer=data / "tokenizer.json",
        data__cache_folder=run / "cache",
        train__samples=4 * STEPS,
        checkpoint__save_interval=2,
        log__tensorboard=True,
    )
    prepare = partial(be_on, "node0", patience=0.3)
    return run_pretrain([*arguments, *options], fault=fault, prepare=prepare)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a run that was killed twice, and one that was left alone."""
    pytest.importorskip("tensorboard", reason="the package tensorboard is optional")
    folder = tmp_path_factory.mktemp("damage")
    make_data(folder / "text")
    make_tokenizer(folder / "tokenizer.json")
    assert start(folder, folder / "alone").exit_code == 0
    for step in (3, 5):
        killed = start(folder, folder / "killed", fault=Fault(step, signal.SIGKILL))
        assert killed.exit_code == -signal.SIGKILL
    return folder


def every_damage(run: Path) -> list[Damage]:
    """Damage of all kinds to all files and folders; always the same."""
    random = Random(0)
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    found = [Damage(path, "remove", 0.0) for path in (*files, *FOLDERS)]
    while len(found) < CASES:
        found += [Damage(path, kind, random.random()) for path in files for kind in KINDS[:2]]
    return found


def sample(run: Path, count: int | None) -> list[Damage]:
    """So many of them, or all; always the same."""
    every = every_damage(run)
    return every if count is None else Random(1).sample(every, count)


def judge(data: Path, run: Path, damage: Damage) -> str:
    """Do the damage to ``run``, start it, and say how that ended."""
    name = Path(damage.path).name
    damage.apply(run)
    before = without_lock(run)
    result = start(data, run)
    told = name in " ".join(result.complaints)
    if result.exit_code in REFUSED:
        if not told:
            return f"silent: refused without the name: {result.stderr}"
        if without_lock(run) != before:
            return "silent: refused and changed"
        result = start(data, run, "--checkpoint.skip_damaged", "true")
        if result.exit_code != 0 or name not in " ".join(result.complaints):
            return f"silent: not passed over: {result.stdout} {result.stderr}"
        return differences(run, data / "alone") or "named"
    if result.exit_code != 0:
        return f"silent: exit code {result.exit_code}: {result.stderr}"
    return differences(run, data / "alone") or ("warned" if told else "harmless")


def without_lock(run: Path) -> dict[str, object]:
    return {path: content for path, content in contents(run).items() if LOCK_FILE not in path}


def differences(run: Path, alone: Path) -> str:
    """In what the run that went on is another than the one that was left alone."""
    if steps(run) != {step: steps(alone)[step] for step in steps(run)} or STEPS not in steps(run):
        return "silent: other steps"
    saves = [path / "checkpoints/step-00000006/rank-00000.safetensors" for path in (run, alone)]
    if hash_file(saves[0]) != hash_file(saves[1]):
        return "silent: other weights"
    return ""


def steps(run: Path) -> dict[int, tuple[str, str]]:
    return {r["step"]: (r["loss_hex"], r["grad_norm_hex"]) for r in records(run, "step")}


def outcomes(folder: Path, tmp_path: Path, count: int | None) -> dict[Damage, str]:
    def work(numbered: tuple[int, Damage]) -> tuple[Damage, str]:
        number, damage = numbered
        run = Path(shutil.copytree(folder / "killed", tmp_path / str(number)))
        outcome = judge(folder, run, damage)
        shutil.rmtree(run)
        return damage, outcome

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(work, enumerate(sample(folder / "killed", count))))


def test_run_folder_holds_every_kind_of_file(folder: Path) -> None:
    kinds = (
        "checkpoints/*/manifest.json",
        "checkpoints/*/rank-*.safetensors",
        "checkpoints/*/tokenizer/tokenizer.json",
        "config.yaml",
        "config-*.yaml",
        "metrics.jsonl",
        "metrics-cut-*.jsonl",
        "tensorboard/events*",
        "cache/*.npy",
        LOCK_FILE,
    )
    found = {path for kind in kinds for path in (folder / "killed").glob(kind)}
    assert all(list((folder / "killed").glob(kind)) for kind in kinds)
    assert found == {path for path in (folder / "killed").rglob("*") if path.is_file()}


@pytest.mark.parametrize("count", [12, pytest.param(None, marks=pytest.mark.nightly)])
def test_no_damage_is_silent(
    folder: Path, tmp_path: Path, count: int | None, figure: Figure
) -> None:
    found = outcomes(folder, tmp_path, count)
    silent = {str(damage): outcome for damage, outcome in found.items() if "silent" in outcome}
    assert silent == {}
    counts = Counter(found.values())
    figure(
        "damage to a run folder",
        cases=len(found),
        named=counts["named"],
        warned=counts["warned"],
        harmless=counts["harmless"],
        silent=len(silent),
    )
