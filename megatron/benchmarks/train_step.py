"""Time and memory of one training step on a CPU, against transformers' BLOOM and a plain model.

    python -m megatron.benchmarks.train_step [--json FILE]

One process and one thread, contenders in turns; see ``measure`` and ``contenders``. Before anything
is timed, all have to find the same loss, or, with another model, that of a guess. The memory of
each is measured in a process of its own: weights, gradients, optimizer and everything that two
steps allocate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from megatron.benchmarks import megatron_core
from megatron.benchmarks.contenders import (
    Contender,
    Shape,
    Step,
    build_engine,
    build_step,
    contenders_for,
    core_step,
    draw_tokens,
    engine_step,
    plain_step,
    transformers_state,
    transformers_step,
)
from megatron.benchmarks.measure import (
    ROUNDS,
    Times,
    Work,
    check_losses,
    check_quiet,
    cpu_seconds,
    interleave,
    peak_bytes,
)
from megatron.benchmarks.program import build_parser
from megatron.benchmarks.ranks import run_alone
from megatron.benchmarks.result import MIB, Result, describe_environment, publish
from megatron.cli import run_tool
from megatron.config import ModelConfig
from megatron.launch import Launch
from megatron.report.tables import Row, Table


def small(layers: int, hidden: int, heads: int, vocab: int, seq: int) -> ModelConfig:
    """A model that a CPU trains in seconds."""
    return ModelConfig(
        num_layers=layers, hidden_size=hidden, num_heads=heads, vocab_size=vocab, seq_length=seq
    )


SHAPES = {
    "tiny": Shape(small(4, 256, 8, 4096, 256), batch=4),
    "med": Shape(small(4, 512, 8, 4096, 512), batch=2),
    "bigvocab": Shape(small(2, 64, 4, 250_880, 256), batch=2),
    "wide": Shape(small(8, 512, 8, 32_000, 512), batch=4, dtype="bf16"),
}
QUICK = {"quick": Shape(small(2, 32, 4, 256, 32), batch=2)}

_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Relative difference of the first losses, by the dtype of the computation."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    parser = build_parser("Time and memory of a training step on a CPU, beside other programs.")
    parser.add_argument("--noisy", action="store_true", help="accept times that vary")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args(argv)
    shapes = QUICK if args.quick else {name: SHAPES[name] for name in args.shapes}
    rows: list[Row] = []
    for name, shape in shapes.items():
        times: dict[str, Times] = run_alone(time_steps, shape, 2 if args.quick else ROUNDS)
        check_quiet(f"training step {name}", times, allow_noise=args.noisy or args.quick)
        memory: dict[str, int] = {c: run_alone(measure_memory, c, shape) for c in times}
        rows += rows_of(name, shape, times, memory)
        # A later shape that fails takes nothing from the earlier ones.
        result = Result("train_step", describe_environment("cpu"), [Table("Training step", rows)])
        publish(result, args.json)
    return 0


def rows_of(
    name: str, shape: Shape, times: Mapping[str, Times], memory: Mapping[str, int]
) -> Iterator[Row]:
    """One row for each contender; the ratio is to transformers, greater is faster."""
    reference = times["transformers"].least
    for contender, found in times.items():
        yield {
            "shape": name,
            "dtype": shape.dtype,
            "contender": contender,
            "CPU s a step": found.least,
            "tokens/s": shape.tokens / found.least,
            "times transformers' speed": reference / found.least,
            "median / least": found.spread,
            "peak MiB": memory[contender] / MIB,
        }


def time_steps(launch: Launch, shape: Shape, rounds: int) -> dict[str, Times]:
    """Times of all contenders, once they agree on the loss."""
    engine = build_engine(shape, launch.groups, launch.device)
    state = transformers_state(engine)
    tokens = draw_tokens(shape, launch.device)
    steps: dict[str, Step] = {
        "ours": engine_step(engine),
        "plain": plain_step(shape, state, launch.device),
        "transformers": transformers_step(shape, state, launch.device),
    }
    losses = {name: step(tokens) for name, step in steps.items()}
    check_losses(losses, losses["ours"], _TOLERANCE[shape.dtype])
    if megatron_core.NAME in contenders_for(shape.dtype, launch.device):
        step = core_step(shape, launch.device)
        megatron_core.check_first_loss(step(tokens), shape.model)
        steps[megatron_core.NAME] = step
    works: dict[str, Work] = {name: partial(step, tokens) for name, step in steps.items()}
    return interleave(works, cpu_seconds, rounds=rounds)


def measure_memory(launch: Launch, contender: Contender, shape: Shape) -> int:
    """Peak bytes of building one contender and taking two steps."""
    return bytes_of_steps(lambda shape: build_step(contender, shape, launch), shape, launch)


def bytes_of_steps(build: Callable[[Shape], Step], shape: Shape, launch: Launch) -> int:
    """Peak bytes of what ``build`` makes and of two of its steps."""
    # Imports what is imported late.
    small = QUICK["quick"]
    build(small)(draw_tokens(small, launch.device))
    tokens = draw_tokens(shape, launch.device)

    def build_and_step() -> None:
        step = build(shape)
        step(tokens)
        step(tokens)

    return peak_bytes(build_and_step, launch.device)


if __name__ == "__main__":
    run_tool(main)
