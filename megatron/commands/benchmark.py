"""``bloom benchmark``: the programs of ``megatron/benchmarks``, by their names."""

from collections.abc import Sequence
from importlib import import_module

from megatron.commands.arguments import CommandParser
from megatron.errors import ConfigError
from megatron.nearest import meant

BENCHMARKS = {
    "attention": "speed of each attention backend",
    "communication": "collectives of one layer, counted, against theory",
    "engines": "the same training step on torch and on DeepSpeed",
    "flops": "operations of a training step, counted, against the formula",
    "fp8_loss": "losses in bf16 and with products in fp8",
    "gains": "what each change to the training step gains",
    "head": "time and memory of the output layer and its loss",
    "kernels": "speed of the fused softmax",
    "launches": "how far a CPU is ahead of its GPU",
    "overhead": "what the engine costs beside a bare loop",
    "page": "make docs/performance.md from the results, in a checkout",
    "precision": "loss curves of layouts in bf16 and fp16",
    "starts": "what the start of a large run exchanges and computes",
    "startup": "CPU seconds until a run has its model",
    "train_step": "time and memory of a training step on a CPU, against others'",
    "train_step_gpu": "speed of training BLOOM on one GPU, against others'",
    "train_step_tensor": "a training step on two tensor ranks, against one process",
}
"""What each measures, by its module."""


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that the command line names; return the exit code.

    Raises:
        ConfigError: if there is none of that name.
    """
    parser = CommandParser(
        "benchmark",
        "Measure speed and memory. NAME is one of:\n\n"
        + "\n".join(f"  {name:<19}{measures}" for name, measures in BENCHMARKS.items()),
        [
            "bloom benchmark head --quick         try it, with tiny sizes",
            "bloom benchmark head --json head.json",
            "bloom benchmark head --help          its options",
        ],
    )
    parser.add_argument("name", metavar="NAME", help="which to run")
    # What follows the name is for the benchmark, its --help too.
    parser.parse(argv[:1])
    name, *options = argv
    if name not in BENCHMARKS:
        raise ConfigError(
            f"bloom benchmark {name:.200}: there is none of that name{meant(name, BENCHMARKS)}"
        )
    exit_code: int = import_module(f"megatron.benchmarks.{name}").main(options)
    return exit_code
