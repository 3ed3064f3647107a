"""Runs of pretrain_bloom in processes of their own, on tiny data.

A rank is forked from a server that has imported the program already. It is as isolated as a started
one and speaks to files, so that a test sees what a user sees: exit codes and lines.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import pretrain_bloom
from megatron.checkpoint.folders import find_latest
from megatron.checkpoint.load import CheckpointReader, open_checkpoint
from megatron.data.indexed_dataset import IndexedDatasetWriter
from megatron.training.metrics import METRICS_FILE, Record, read_metrics
from megatron.training.progress import Progress
from megatron.training.reporter import Reporter
from megatron.training.saving import CHECKPOINTS
from tests.distributed import preload

VOCAB_SIZE = 509
SEQ_LENGTH = 32
TIMEOUT = 60.0

_CONTEXT = multiprocessing.get_context("forkserver")
preload(__name__)


class Failing(Protocol):
    """What goes wrong in ``rank``: it is armed there before the run begins."""

    @property
    def rank(self) -> int: ...

    def arm(self) -> None: ...


@dataclass(frozen=True)
class Fault:
    """A signal that ``rank`` sends itself at the end of ``step``."""

    step: int
    signal: signal.Signals
    rank: int = 0

    def arm(self) -> None:
        tell = Reporter.step

        def tell_and_fail(self_: Reporter, progress: Progress, *args: Any) -> None:
            tell(self_, progress, *args)
            if progress.step == self.step:
                os.kill(os.getpid(), self.signal)

        setattr(Reporter, "step", tell_and_fail)  # noqa: B010


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        exit_codes: of every rank; minus the number of the signal that killed it.
        stdout, stderr: of all ranks, one after another.
        seconds: from the start to the end of the last rank.
        ended: when that was, as ``time.monotonic`` tells it.
    """

    exit_codes: list[int]
    stdout: str
    stderr: str
    seconds: float
    ended: float

    @property
    def exit_code(self) -> int:
        """The exit code of all ranks, which must be the same."""
        assert len(set(self.exit_codes)) == 1, (self.exit_codes, self.stderr)
        return self.exit_codes[0]

    @property
    def complaints(self) -> list[str]:
        """All lines that only inform left out."""
        lines = (self.stdout + self.stderr).splitlines()
        return [line for line in lines if line.strip() and " INFO " not in line]


def run_pretrain(
    argv: Sequence[str],
    *,
    world_size: int = 1,
    env: Mapping[str, str] | None = None,
    ranks: Sequence[int] | None = None,
    fault: Failing | None = None,
    prepare: Callable[[], object] | None = None,
    stalled: Collection[int] = (),
    delays: Mapping[int, float] | None = None,
    first_ends_all: bool = False,
    timeout: float = TIMEOUT,
) -> Result:
    """Run ``pretrain_bloom.main(argv)`` on every rank, as a launcher starts it.

    The test fails, naming the ranks, if some have not ended after ``timeout`` seconds.

    Args:
        env: variables besides those that a launcher sets, or instead of them.
        ranks: those that are started; None is all.
        prepare: called in every rank before the program, in which it may change something.
        stalled: those that do not end by themselves, and are killed after the others.
        delays: seconds by which a rank is slow to start.
        first_ends_all: a rank that fails lets the launcher end all others, as torchrun's does.
    """
    launcher = _launcher_env(world_size)
    started = time.monotonic()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        processes = {}
        for rank in range(world_size) if ranks is None else ranks:
            variables = {**launcher, **({"RANK": str(rank)} if launcher else {}), **(env or {})}
            processes[rank] = _CONTEXT.Process(
                target=_run_rank,
                args=(
                    list(argv),
                    folder / f"{rank}",
                    variables,
                    _of_rank(fault, rank),
                    prepare,
                    (delays or {}).get(rank, 0.0),
                ),
            )
            processes[rank].start()
        hung = _wait(processes, started + timeout, stalled, first_ends_all)
        ended = time.monotonic()
        stdout, stderr = (_read(folder, processes, name) for name in ("stdout", "stderr"))
        assert not hung, f"ranks {hung} hung for {timeout} s\n{stdout}{stderr}"
        exit_codes = [process.exitcode or 0 for process in processes.values()]
    return Result(exit_codes, stdout, stderr, ended - started, ended)


def _launcher_env(world_size: int) -> dict[str, str]:
    """What a launcher would set, besides the rank; nothing for a process that is alone."""
    if world_size == 1:
        return {}
    return {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _of_rank(fault: Failing | None, rank: int) -> Failing | None:
    return fault if fault is not None and fault.rank == rank else None


def _wait(
    processes: Mapping[int, ForkServerProcess],
    deadline: float,
    stalled: Collection[int],
    first_ends_all: bool,
) -> list[int]:
    """Wait for all processes; kill those that are late, and return their ranks."""
    running = {process.sentinel: rank for rank, process in processes.items() if rank not in stalled}
    while running and (left := deadline - time.monotonic()) > 0:
        for sentinel in wait(list(running), left):
            rank = running.pop(sentinel)  # type: ignore[arg-type]
            processes[rank].join()
            if first_ends_all and processes[rank].exitcode:
                for other in running.values():
                    processes[other].terminate()
    for rank in (*running.values(), *stalled):
        processes[rank].kill()
    for process in processes.values():
        process.join()
    return sorted(running.values())


def _read(folder: Path, ranks: Mapping[int, object], stream: str) -> str:
    paths = [folder / f"{rank}.{stream}" for rank in ranks]
    return "".join(path.read_text() for path in paths if path.exists())


def _run_rank(
    argv: list[str],
    output: Path,
    env: Mapping[str, str],
    fault: Failing | None,
    prepare: Callable[[], object] | None,
    delay: float,
) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        with Path(f"{output}.{name}").open("wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(env)
    torch.set_num_threads(1)
    time.sleep(delay)
    if fault is not None:
        fault.arm()
    if prepare is not None:
        prepare()
    pretrain_bloom.main(argv)


def options(**values: object) -> list[str]:
    """``train__samples=3`` as ``--train.samples 3``, and so on."""
    pairs = ((name.replace("__", "."), value) for name, value in values.items())
    return [text for name, value in pairs for text in (f"--{name}", _text(value))]


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool | dict | list | None) else str(value)


def base_argv(folder: Path, /, **changes: object) -> list[str]:
    """The arguments of a small run in ``folder / "run"`` on the data ``folder / "text"``."""
    return options(
        **{
            "folder": folder / "run",
            "model__num_layers": 2,
            "model__hidden_size": 64,
            "model__num_heads": 4,
            "model__vocab_size": VOCAB_SIZE,
            "model__seq_length": SEQ_LENGTH,
            "data__paths": {str(folder / "text"): 1.0},
            "train__samples": 80,
            "train__global_batch_size": 4,
            "train__micro_batch_size": 2,
            "train__dtype": "fp64",
            "optimizer__lr": 0.005,
            "launch__device": "cpu",
            **changes,
        }
    )


def make_data(prefix: Path, *, documents: int = 40, seed: int = 0) -> None:
    """A dataset that can be learnt: each token tells the next, but for one in ten."""
    random = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            tokens = [int(random.integers(1, VOCAB_SIZE))]
            for jump in random.random(random.integers(40, 90)) < 0.1:
                following = (3 * tokens[-1] + 1) % 50 + 1
                tokens.append(int(random.integers(1, VOCAB_SIZE)) if jump else following)
            writer.add([*tokens, 0])
            writer.end_document()


def make_tokenizer(path: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """A tokenizer of ``vocab_size`` words, the first of which ends a document."""
    words = {"<|endoftext|>": 0, **{f"w{number}": number for number in range(1, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


def records(run: Path, event: str) -> list[Record]:
    """The records of one kind in the metrics of a run."""
    return [record for record in read_metrics(run / METRICS_FILE) if record["event"] == event]


def values(run: Path, field: str) -> list[Any]:
    """One field of every step of a run, after a check that each step is there once."""
    steps = records(run, "step")
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    return [step[field] for step in steps]


def contents(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Everything in ``folder``: names, times of files, and bytes; nothing of what is not there."""
    found: dict[str, tuple[int, bytes | None]] = {}
    for path in [folder, *folder.rglob("*")]:
        if path.is_file():
            found[str(path)] = path.stat().st_mtime_ns, path.read_bytes()
        elif path.is_dir():
            found[str(path)] = 0, None
    return found


def newest_save(run: Path) -> CheckpointReader:
    """The newest save of a run, verified."""
    path = find_latest(run / CHECKPOINTS)
    assert path is not None
    return open_checkpoint(path)


def command(argv: Sequence[str], *, world_size: int = 1) -> list[str]:
    """What a user types to run the program, by torchrun if on several ranks."""
    launcher = [
        *("-m", "torch.distributed.run"),
        f"--nproc_per_node={world_size}",
        f"--master_port={free_port()}",
    ]
    program = [pretrain_bloom.__file__, *argv]
    return [sys.executable, *(launcher if world_size > 1 else []), *program]


def processes_with(text: str) -> list[str]:
    """The command lines of all processes of this machine that have ``text`` in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        # Processes come and go.
        with suppress(OSError):
            found.append(path.read_text(errors="replace"))
    return [line for line in found if text in line]
