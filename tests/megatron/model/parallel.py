"""Run a model once at some layout and bring its whole weights and gradients home."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.config import Backend, DataConfig, ModelConfig, Recompute
from megatron.model.init import build_model, init_parameter
from megatron.model.inputs import ModelInputs, build_inputs
from megatron.model.language_model import BloomForPretraining
from megatron.model.placement import Placement
from megatron.optim.flat_parameters import FlatParameters
from mpu import ParallelDims, RngStreams, ShardSpec, build_groups, shard_spec
from tests.distributed import run_ranks
from tests.shards import join

BATCH = 2
EOD = 5


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks."""

    tensor: int = 1
    sequence: bool = False

    def __str__(self) -> str:
        return f"tensor {self.tensor}{' sequence' if self.sequence else ''}"


ONE_RANK = Layout()
PARALLEL = (Layout(2), Layout(2, sequence=True), Layout(4), Layout(4, sequence=True))


@dataclass(frozen=True)
class Job:
    """What is run.

    Attributes:
        model: its shape.
        data: what happens at the end of documents, of which the data have many.
        recompute: see ``TrainConfig``.
        backend: how attention is computed.
    """

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    recompute: Recompute = "none"
    backend: Backend = "blocked"


@dataclass(frozen=True)
class Outcome:
    """The objective, the norm of its gradient, and whole weights and gradients by name."""

    loss: float
    grad_norm: float
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class _RankOutcome:
    loss: float
    grad_norm: float
    specs: dict[str, ShardSpec]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]


def run_job(job: Job, layout: Layout) -> Outcome:
    """One forward and backward pass in float64.

    Fails if ranks that should hold the same hold something else.
    """
    ranks: list[_RankOutcome] = run_ranks(layout.tensor, _run_rank, job, layout)
    assert len({(rank.loss, rank.grad_norm) for rank in ranks}) == 1, "losses differ between ranks"
    return Outcome(
        loss=ranks[0].loss,
        grad_norm=ranks[0].grad_norm,
        weights=_whole(ranks[0].specs, [rank.weights for rank in ranks]),
        gradients=_whole(ranks[0].specs, [rank.gradients for rank in ranks]),
    )


def _run_rank(job: Job, layout: Layout) -> _RankOutcome:
    groups = build_groups(ParallelDims(tensor=layout.tensor))
    placement = Placement(groups.tensor, layout.sequence, torch.float64)
    model = build_model(
        job.model,
        placement,
        device=torch.device("meta"),
        backend=job.backend,
        recompute=job.recompute,
    )
    parameters = FlatParameters([model], groups, torch.device("cpu"))
    parameters.initialise(
        lambda name, parameter: init_parameter(name, parameter, job.model, placement, seed=1)
    )
    loss = _objective(model, _inputs(job))
    loss.backward()
    parameters.reduce_gradients()
    grad_norm = parameters.gradient_norm()
    named = dict(model.named_parameters())
    return _RankOutcome(
        loss=loss.item(),
        grad_norm=grad_norm.item(),
        specs={name: shard_spec(parameter) for name, parameter in named.items()},
        weights={name: parameter.detach().clone() for name, parameter in named.items()},
        gradients={name: g.clone() for name, p in named.items() if (g := p.grad) is not None},
    )


def _inputs(job: Job) -> ModelInputs:
    config = job.model
    tokens = torch.randint(0, config.vocab_size, (BATCH, config.seq_length + 1))
    tokens[:, 7::11] = EOD
    return build_inputs(tokens, torch.tensor([3, 70]), job.data, EOD, torch.float64)


def _objective(model: BloomForPretraining, inputs: ModelInputs) -> Tensor:
    """The loss; with a pooler, plus something of what it pools from tokens of several types."""
    streams = RngStreams(5, inputs.samples)
    loss: Tensor = model(inputs, streams) / inputs.tokens.numel()
    if model.config.pooler:
        types = inputs.tokens % model.config.num_token_types
        hidden = model.language_model(inputs.tokens, token_types=types, streams=streams)
        loss = loss + model.language_model.pooled(hidden).square().mean()
    return loss


def _whole(specs: dict[str, ShardSpec], ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    whole = {}
    for name, spec in specs.items():
        parts = [rank[name] for rank in ranks]
        replicas = parts if spec.dim is None else []
        assert all(torch.equal(part, parts[0]) for part in replicas), f"replicas of {name} differ"
        whole[name] = join(parts, spec)
    return whole
