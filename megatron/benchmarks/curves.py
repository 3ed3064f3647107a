"""Loss curves of a small model: the text it reads, its training, and how curves are compared.

The text is the bytes of pydoc's help topics, 256 words that need no tokenizer. A point of a curve
is the mean loss of an interval of steps, since single batches differ more than runs do.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from megatron.atomic import atomic_write, make_folder
from megatron.commands.corpus import choose, topic_documents
from megatron.config import Config, ModelConfig, OptimizerConfig
from megatron.data.sampler import microbatch_samples
from megatron.engine.base import StepResult
from megatron.engine.torch_engine import TorchEngine
from megatron.launch import Launch
from megatron.model.inputs import ModelInputs
from megatron.optim.schedule import learning_rate
from megatron.report.tables import Row
from megatron.tuning.attention import choose_backend

STYLES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))


@dataclass(frozen=True)
class Size:
    """Of the model, the batches and the run; ``interval`` steps make one point of a curve."""

    model: ModelConfig
    batch: int
    steps: int
    interval: int

    @property
    def samples(self) -> int:
        """All that a run trains on."""
        return self.steps * self.batch

    @property
    def optimizer(self) -> OptimizerConfig:
        """One schedule for all runs."""
        return OptimizerConfig(lr=2e-3, min_lr=2e-4, warmup_samples=self.samples // 10)

    @property
    def points(self) -> list[int]:
        """The last step of each point of a curve."""
        return [*range(self.interval, self.steps, self.interval), self.steps]

    def means(self, losses: Sequence[float]) -> list[float]:
        """The points of the curve of these losses, one of each step."""
        starts = range(0, len(losses), self.interval)
        return [mean(losses[start : start + self.interval]) for start in starts]


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


def build_engine(launch: Launch, config: Config) -> TorchEngine:
    """The engine of this rank."""
    choice = choose_backend(config, launch.device, {}, group=launch.groups.tensor)
    return TorchEngine(config, launch.groups, launch.device, choice.backend)


def train(
    engine: TorchEngine, config: Config, launch: Launch, samples: Tensor
) -> Iterator[StepResult]:
    """Train from the first of ``samples`` to the end of the run that ``config`` describes."""
    batch, data = config.train.global_batch_size, launch.groups.data
    for first in range(0, config.train.samples, batch):
        lr = learning_rate(first + batch, config.optimizer, config.train.samples)
        parts = microbatch_samples(
            first, batch, config.train.least_micro_batch_size, data.rank(), data.size()
        )
        yield engine.train_step([microbatch(samples, part) for part in parts], lr)


def curve_rows(curves: Mapping[str, Sequence[float]], size: Size) -> Iterator[Row]:
    """One row for each point of the curves of these losses."""
    means = {name: size.means(losses) for name, losses in curves.items()}
    for index, step in enumerate(size.points):
        yield {"up to step": step, **{name: points[index] for name, points in means.items()}}


def draw(above: Axes, below: Axes, curves: Mapping[str, Sequence[float]], size: Size) -> None:
    """Draw the curves of these losses, and below their distances from the first of them."""
    means = {name: size.means(losses) for name, losses in curves.items()}
    first, *_ = means
    for (name, points), style in zip(means.items(), STYLES, strict=False):
        distances = [a - b for a, b in zip(points, means[first], strict=True)]
        above.plot(size.points, points, linestyle=style, label=name)
        below.plot(size.points, distances, linestyle=style)
    above.set_ylabel("loss (nats a byte)")
    above.legend()
    below.set_ylabel(f"minus that of {first}")
    below.set_xlabel("step")


def write_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` to ``path`` as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    make_folder(path.parent)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
