"""Losses of a small model that trains in bf16, and of the same one with products in fp8.

    python -m megatron.benchmarks.fp8_loss [--json FILE] [--figure FILE.png]

    bf16           the reference
    bf16 + fp8     train.fp8: the same initial weights and batches
    another seed   bf16 again, from other initial weights: how far apart runs are anyhow

On a GPU the products are those of its tensor cores; on a CPU the same rounding is emulated.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from matplotlib.figure import Figure

from megatron.benchmarks.curves import (
    Size,
    build_engine,
    curve_rows,
    draw,
    microbatch,
    read_samples,
    train,
    write_figure,
)
from megatron.benchmarks.program import build_parser
from megatron.benchmarks.ranks import Device, run_alone
from megatron.benchmarks.result import Result, describe_environment, publish
from megatron.cli import run_tool
from megatron.config import Config, ModelConfig, TrainConfig
from megatron.launch import Launch
from megatron.report.tables import Row, Table

HELD_OUT = 32
"""Samples at the end, which no run trains on."""


@dataclass(frozen=True)
class Variant:
    """What one run does in its own way."""

    fp8: bool
    seed: int


@dataclass(frozen=True)
class Curve:
    """Losses of one run: of each step, and on the held-out text after the last."""

    losses: tuple[float, ...]
    held_out: float


FULL = Size(
    ModelConfig(num_layers=4, hidden_size=128, num_heads=4, vocab_size=256, seq_length=128),
    batch=8,
    steps=300,
    interval=20,
)
QUICK = Size(
    ModelConfig(num_layers=1, hidden_size=16, num_heads=2, vocab_size=256, seq_length=16),
    batch=2,
    steps=4,
    interval=2,
)
VARIANTS = {
    "bf16": Variant(fp8=False, seed=1),
    "bf16 + fp8": Variant(fp8=True, seed=1),
    "another seed": Variant(fp8=False, seed=2),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    parser = build_parser("Losses in bf16, and in bf16 with products in fp8.")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the curves there, as PNG")
    args = parser.parse_args(argv)
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    size = QUICK if args.quick else FULL
    curves: dict[str, Curve] = {
        name: run_alone(train_run, size, variant, device=device)
        for name, variant in VARIANTS.items()
    }
    environment = {**describe_environment(device), "torchao": version("torchao")}
    summary = Table("Loss in nats a byte", list(summary_rows(curves, size)))
    losses = {name: curve.losses for name, curve in curves.items()}
    points = Table(f"Mean loss of each {size.interval} steps", list(curve_rows(losses, size)))
    publish(Result("fp8_loss", environment, [summary, points]), args.json)
    if args.figure is not None:
        write_figure(draw_all(losses, size), args.figure)
    return 0


def train_run(launch: Launch, size: Size, variant: Variant) -> Curve:
    """Train one run from its beginning to its end."""
    config = make_config(size, variant)
    engine = build_engine(launch, config)
    samples = read_samples(size.model.seq_length).to(launch.device)
    losses = tuple(result.loss for result in train(engine, config, launch, samples))
    held_out = microbatch(samples, range(len(samples) - HELD_OUT, len(samples)))
    return Curve(losses, engine.evaluate([held_out]))


def make_config(size: Size, variant: Variant) -> Config:
    """The config of one run; all have the same schedule."""
    return Config(
        folder=Path("unused"),
        model=size.model,
        train=TrainConfig(
            samples=size.samples,
            global_batch_size=size.batch,
            micro_batch_size=size.batch,
            seed=variant.seed,
            dtype="bf16",
            fp8=variant.fp8,
        ),
        optimizer=size.optimizer,
    )


def summary_rows(curves: Mapping[str, Curve], size: Size) -> Iterator[Row]:
    """One row for each run: where it ends, and how far that is from the reference."""
    reference = curves["bf16"]
    for name, curve in curves.items():
        yield {
            "run": name,
            f"last {size.interval} steps": size.means(curve.losses)[-1],
            "held out": curve.held_out,
            "held out, against bf16": f"{curve.held_out / reference.held_out - 1:+.2%}",
        }


def draw_all(losses: Mapping[str, Sequence[float]], size: Size) -> Figure:
    """The curves, and their distance from that of bf16."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    draw(above, below, losses, size)
    return figure


if __name__ == "__main__":
    run_tool(main)
