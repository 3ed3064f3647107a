"""Loss curves of layouts in bf16 and fp16, against one process and against other seeds.

    python -m megatron.benchmarks.precision [--json FILE] [--figure FILE.png]

In fp64 all layouts find the same numbers, which tests check. In low precision they round in other
places, and runs that differ in the last bit drift apart. How far they may is told by runs from
other initial weights, which are as good: at every point of its curve, a layout has to be nearer to
one process than the farthest of three seeds of one process are to each other.

In fp16 the loss scale begins at what the first gradients bear in every layout, so that rounding is
compared, and not how many steps of the warm-up are skipped. With ZeRO 3 that is less than
elsewhere: FSDP has the whole gradient of a weight in fp16 before it is reduced, where the others
add products to float32. Every microbatch is one sample, because the scale is of its mean loss.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path
from statistics import mean
from typing import Literal, TypeAlias, get_args

from matplotlib.figure import Figure

from megatron.benchmarks.curves import (
    Size,
    build_engine,
    curve_rows,
    draw,
    read_samples,
    train,
    write_figure,
)
from megatron.benchmarks.program import build_parser
from megatron.benchmarks.ranks import run_ranks
from megatron.benchmarks.result import Result, describe_environment, publish
from megatron.cli import run_tool
from megatron.config import (
    Config,
    LossScaleConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron.launch import Launch
from megatron.report.tables import Cell, Row, Table
from mpu import ParallelDims

Precision: TypeAlias = Literal["bf16", "fp16"]

FIRST_SCALE = 2.0**13
"""Of the loss in fp16: small enough for the first gradients of every layout."""

FULL = Size(
    ModelConfig(num_layers=4, hidden_size=64, num_heads=4, vocab_size=256, seq_length=64),
    batch=8,
    steps=200,
    interval=20,
)
QUICK = Size(
    ModelConfig(num_layers=4, hidden_size=16, num_heads=2, vocab_size=256, seq_length=8),
    batch=8,
    steps=4,
    interval=2,
)
ONE_PROCESS = "one process"
LAYOUTS = {
    ONE_PROCESS: ParallelConfig(data=1),
    "tensor 2, sequence": ParallelConfig(tensor=2, sequence=True, data=1),
    "pipeline 2, interleaved": ParallelConfig(
        pipeline=2, schedule="interleaved_1f1b", chunks=2, data=1
    ),
    "data 2, ZeRO 1": ParallelConfig(data=2, zero=1),
    "data 2, ZeRO 3": ParallelConfig(data=2, zero=3),
    "tensor 2, pipeline 2, zero bubble": ParallelConfig(
        tensor=2, pipeline=2, schedule="zero_bubble", data=1, zero=1
    ),
}
SEED, OTHER_SEEDS = 1, (2, 3)


@dataclass(frozen=True)
class Run:
    """What a run reported.

    Attributes:
        losses: of each step.
        skipped: steps whose gradient overflowed.
        scale: of the loss, at the end; None without one.
    """

    losses: tuple[float, ...]
    skipped: int
    scale: float | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    parser = build_parser("Loss curves of layouts in bf16 and fp16.")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the curves there, as PNG")
    args = parser.parse_args(argv)
    size = QUICK if args.quick else FULL
    runs = run_all(size)
    tables = [table for dtype, found in runs.items() for table in tables_of(dtype, found, size)]
    publish(Result("precision", describe_environment("cpu"), tables), args.json)
    if args.figure is not None:
        write_figure(draw_all(runs, size), args.figure)
    return 0


def run_all(size: Size) -> dict[Precision, dict[str, Run]]:
    """All layouts with one seed, and one process with the others."""
    runs = {name: run(size, layout, SEED) for name, layout in LAYOUTS.items()}
    for seed in OTHER_SEEDS:
        runs[f"{ONE_PROCESS}, seed {seed}"] = run(size, LAYOUTS[ONE_PROCESS], seed)
    return {
        dtype: {name: found[dtype] for name, found in runs.items()} for dtype in get_args(Precision)
    }


def run(size: Size, layout: ParallelConfig, seed: int) -> dict[Precision, Run]:
    """A run in each precision, on ranks of their own."""
    configs = {dtype: make_config(size, dtype, layout, seed) for dtype in get_args(Precision)}
    found: dict[Precision, Run] = run_ranks(dims_of(layout), train_rank, configs)[0]
    return found


def dims_of(layout: ParallelConfig) -> ParallelDims:
    """The rank grid of a layout."""
    assert layout.data is not None
    return ParallelDims(layout.tensor, layout.data, layout.pipeline)


def make_config(size: Size, dtype: Precision, layout: ParallelConfig, seed: int) -> Config:
    """The config of one run."""
    return Config(
        folder=Path("unused"),
        model=size.model,
        parallel=layout,
        train=TrainConfig(
            samples=size.samples,
            global_batch_size=size.batch,
            seed=seed,
            dtype=dtype,
            loss_scale=LossScaleConfig(initial=FIRST_SCALE),
        ),
        optimizer=size.optimizer,
    )


def train_rank(launch: Launch, configs: Mapping[Precision, Config]) -> dict[Precision, Run]:
    """Train all of them, one after the other."""
    return {dtype: _train(launch, config) for dtype, config in configs.items()}


def _train(launch: Launch, config: Config) -> Run:
    engine = build_engine(launch, config)
    samples = read_samples(config.model.seq_length)
    results = list(train(engine, config, launch, samples))
    return Run(
        losses=tuple(result.loss for result in results),
        skipped=sum(result.skipped for result in results),
        scale=engine.scalars().get("loss_scale"),
    )


def tables_of(dtype: Precision, runs: Mapping[str, Run], size: Size) -> Iterator[Table]:
    """How far the runs are apart, and their curves."""
    yield Table(f"Layouts in {dtype}", list(rows_of(runs, size)))
    losses = {name: run.losses for name, run in runs.items()}
    title = f"Mean loss of each {size.interval} steps in {dtype}"
    yield Table(title, list(curve_rows(losses, size)))


def rows_of(runs: Mapping[str, Run], size: Size) -> Iterator[Row]:
    """One row for each run; distances are from one process, and the spread is of its seeds."""
    points = {name: size.means(run.losses) for name, run in runs.items()}
    spread = spread_of([points[name] for name in points if name.startswith(ONE_PROCESS)])
    for name, run in runs.items():
        distances = [abs(a - b) for a, b in zip(points[name], points[ONE_PROCESS], strict=True)]
        ratio = max(a / b for a, b in zip(distances, spread, strict=True))
        row: dict[str, Cell] = {
            "layout": name,
            "loss at the end": f"{points[name][-1]:.4f}",
            "largest distance": max(distances),
            "mean distance": mean(distances),
            "mean spread of the seeds": mean(spread),
            "largest distance / spread": ratio,
            "inside": None if name.startswith(ONE_PROCESS) else "yes" if ratio < 1 else "no",
        }
        if run.scale is not None:
            scale = f"2^{log2(run.scale):g}"
            row |= {"steps skipped": run.skipped, "loss scale at the end": scale}
        yield row


def spread_of(curves: Sequence[Sequence[float]]) -> list[float]:
    """How far curves are apart at each point."""
    return [max(values) - min(values) for values in zip(*curves, strict=True)]


def draw_all(runs: Mapping[Precision, Mapping[str, Run]], size: Size) -> Figure:
    """The curves of each precision, and their distances in the band that the seeds leave."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, len(runs), sharex=True, sharey="row", height_ratios=(3, 2))
    for (dtype, found), (above, below) in zip(runs.items(), axes.T, strict=True):
        draw(above, below, {name: found[name].losses for name in LAYOUTS}, size)
        seeds = [size.means(run.losses) for name, run in found.items() if name not in LAYOUTS]
        spread = spread_of([size.means(found[ONE_PROCESS].losses), *seeds])
        below.fill_between(
            size.points, spread, [-x for x in spread], alpha=0.2, label="spread of three seeds"
        )
        above.set_title(dtype)
        below.legend()
    return figure


if __name__ == "__main__":
    run_tool(main)
