"""Seconds from an imported torch to a model that is ready to get its weights.

    python -m megatron.benchmarks.startup [--json FILE]

BLOOM 1b7: everything that a run imports, its config parsed and validated, and the model built on
meta tensors. In a new process each time; of several the least counts.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence

from megatron.benchmarks.program import Run, run_benchmark
from megatron.cli import run_tool
from megatron.report.tables import Table

_PROGRAM = """
import time
import torch, torch.distributed
start = time.process_time()
import megatron.commands.train
imported = time.process_time()
from megatron.config import load_config
from megatron.launch import launched, read_environment
from megatron.model.language_model import BloomForPretraining
from megatron.model.placement import Placement
config = load_config([
    "--folder", "unused", "--model.num_layers", "24", "--model.hidden_size", "2048",
    "--model.num_heads", "16", "--model.vocab_size", "250680", "--model.seq_length", "2048",
    "--train.samples", "1", "--train.global_batch_size", "1", "--launch.device", "cpu",
])
configured = time.process_time()
with launched(config.layout, config.launch, read_environment()) as launch:
    joined = time.process_time()
    with torch.device("meta"):
        BloomForPretraining(config.model, Placement(launch.groups.tensor), backend="blocked")
    built = time.process_time()
print(imported - start, configured - imported, joined - configured, built - joined)
"""

_PARTS = ("imports after torch", "config", "process group", "model")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    description = "Seconds until a run has its model."
    return run_benchmark("startup", description, measure, argv, timed=False)


def measure(run: Run) -> Iterator[Table]:
    """The table of the parts."""
    seconds = min((start_once() for _ in range(2 if run.quick else 6)), key=sum)
    parts = [*zip(_PARTS, seconds, strict=True), ("together", sum(seconds))]
    yield Table("Start of BLOOM 1b7", [{"part": part, "CPU s": s} for part, s in parts])


def start_once() -> list[float]:
    """CPU seconds of the parts, in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], check=True, stdout=subprocess.PIPE, text=True
    )
    return [float(word) for word in done.stdout.split()]


if __name__ == "__main__":
    run_tool(main)
