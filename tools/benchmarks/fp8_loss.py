"""Losses of a small model that trains in bf16, and of the same one with products in fp8.

    python -m tools.benchmarks.fp8_loss [--json FILE] [--figure FILE.png]

    bf16           the reference
    bf16 + fp8     train.fp8: the same initial weights and batches
    another seed   bf16 again, from other initial weights: how far apart runs are anyhow

It reads the bytes of pydoc's help topics, 256 words that need no tokenizer. On a GPU the products
are those of its tensor cores; on a CPU the same rounding is emulated.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from megatron.atomic import atomic_write, make_folder
from megatron.cli import run_tool
from megatron.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from megatron.engine.torch_engine import TorchEngine
from megatron.launch import Launch
from megatron.model.inputs import ModelInputs
from megatron.optim.schedule import learning_rate
from megatron.training.attention_choice import choose_backend
from tools.benchmarks.program import build_parser
from tools.benchmarks.ranks import Device, run_alone
from tools.benchmarks.result import Result, Row, Table, describe_environment, publish
from tools.collect_corpus import choose, topic_documents

HELD_OUT = 32
"""Samples at the end, which no run trains on."""

STYLES = ("-", "--", ":")


@dataclass(frozen=True)
class Size:
    """Of the model, the batches and the run; ``interval`` steps make one point of a curve."""

    model: ModelConfig
    batch: int
    steps: int
    interval: int

    @property
    def points(self) -> list[int]:
        """The last step of each point of a curve."""
        return [*range(self.interval, self.steps, self.interval), self.steps]


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

    def means(self, interval: int) -> list[float]:
        """Mean losses of each ``interval`` steps."""
        starts = range(0, len(self.losses), interval)
        return [mean(self.losses[start : start + interval]) for start in starts]


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
        name: run_alone(train, size, variant, device=device) for name, variant in VARIANTS.items()
    }
    environment = {**describe_environment(device), "torchao": version("torchao")}
    summary = Table("Loss in nats a byte", list(summary_rows(curves, size)))
    points = Table(f"Mean loss of each {size.interval} steps", list(curve_rows(curves, size)))
    publish(Result("fp8_loss", environment, [summary, points]), args.json)
    if args.figure is not None:
        write_figure(draw(points), args.figure)
    return 0


def train(launch: Launch, size: Size, variant: Variant) -> Curve:
    """Train one run from its beginning to its end."""
    config = make_config(size, variant)
    choice = choose_backend(config, launch.device, {}, group=launch.groups.tensor)
    engine = TorchEngine(config, launch.groups, launch.device, choice.backend)
    samples = read_samples(size.model.seq_length).to(launch.device)
    losses = []
    for step in range(size.steps):
        first = step * size.batch
        lr = learning_rate(first + size.batch, config.optimizer, config.train.samples)
        batch = microbatch(samples, range(first, first + size.batch))
        losses.append(engine.train_step([batch], lr).loss)
    held_out = microbatch(samples, range(len(samples) - HELD_OUT, len(samples)))
    return Curve(tuple(losses), engine.evaluate([held_out]))


def make_config(size: Size, variant: Variant) -> Config:
    """The config of one run; all have the same schedule."""
    samples = size.steps * size.batch
    return Config(
        folder=Path("unused"),
        model=size.model,
        train=TrainConfig(
            samples=samples,
            global_batch_size=size.batch,
            micro_batch_size=size.batch,
            seed=variant.seed,
            dtype="bf16",
            fp8=variant.fp8,
        ),
        optimizer=OptimizerConfig(lr=2e-3, min_lr=2e-4, warmup_samples=samples // 10),
    )


def read_samples(seq: int) -> Tensor:
    """The bytes of the help topics, ``(n, seq + 1)``, in mixed order."""
    text = "".join(document.text for document in choose(topic_documents(), None))
    numbers = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    samples = numbers.unfold(0, seq + 1, seq)
    return samples[torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))]


def microbatch(samples: Tensor, numbers: range) -> ModelInputs:
    """The samples of these numbers, in which each byte predicts the next."""
    chosen = samples[numbers.start : numbers.stop]
    tokens, targets = chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous()
    weights = torch.ones(tokens.shape, device=samples.device)
    return ModelInputs(tokens, targets, weights, torch.tensor(numbers, device=samples.device))


def summary_rows(curves: Mapping[str, Curve], size: Size) -> Iterator[Row]:
    """One row for each run: where it ends, and how far that is from the reference."""
    reference = curves["bf16"]
    for name, curve in curves.items():
        yield {
            "run": name,
            f"last {size.interval} steps": curve.means(size.interval)[-1],
            "held out": curve.held_out,
            "held out, against bf16": f"{curve.held_out / reference.held_out - 1:+.2%}",
        }


def curve_rows(curves: Mapping[str, Curve], size: Size) -> Iterator[Row]:
    """One row for each point of the curves."""
    means = {name: curve.means(size.interval) for name, curve in curves.items()}
    for index, step in enumerate(size.points):
        yield {"up to step": step, **{name: points[index] for name, points in means.items()}}


def draw(points: Table) -> Figure:
    """The curves of ``curve_rows``, and their distance from that of bf16."""
    steps, *columns = zip(*(row.values() for row in points.rows), strict=True)
    curves = np.array(columns, dtype=float)
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    names = list(points.rows[0])[1:]
    for name, curve, style in zip(names, curves, STYLES, strict=True):
        above.plot(steps, curve, style, label=name)
        below.plot(steps, curve - curves[0], style)
    above.set_ylabel("loss (nats a byte)")
    above.legend()
    below.set_ylabel(f"minus that of {names[0]}")
    below.set_xlabel("step")
    return figure


def write_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` to ``path`` as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    make_folder(path.parent)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


if __name__ == "__main__":
    run_tool(main)
