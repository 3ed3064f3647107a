"""A model whose layers communicate beside their products, against the ordinary one, in float64."""

import pytest
import torch
from torch import Tensor

from megatron.config import Activation, Backend, ModelConfig
from megatron.model.init import build_model, init_parameters
from megatron.model.inputs import ModelInputs
from megatron.model.placement import Placement
from mpu import ParallelDims, RngStreams, build_groups
from tests.distributed import run_ranks
from tests.figures import Figure
from tests.mpu.symmetric import operators_on_cpu


@pytest.mark.parametrize(
    ("backend", "activation"), [("blocked", "gelu"), ("sdpa", "swiglu"), ("explicit", "gelu")]
)
def test_model_matches_the_ordinary_one(
    backend: Backend, activation: Activation, figure: Figure
) -> None:
    ranks = run_ranks(2, both_outcomes, backend, activation)
    largest = 0.0
    for ordinary, overlapping in ranks:
        assert ordinary.keys() == overlapping.keys()
        for name, want in ordinary.items():
            difference = (overlapping[name] - want).abs().max().item()
            assert difference < 1e-12, name
            largest = max(largest, difference)
    figure("model in symmetric memory against the ordinary one", difference=largest)


@operators_on_cpu()
def both_outcomes(
    backend: Backend, activation: Activation
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss and gradients without and with overlap."""
    ordinary, overlapping = (outcome(backend, activation, overlap) for overlap in (False, True))
    return ordinary, overlapping


def outcome(backend: Backend, activation: Activation, overlap: bool) -> dict[str, Tensor]:
    config = ModelConfig(
        num_layers=2,
        hidden_size=24,
        num_heads=4,
        vocab_size=61,
        seq_length=16,
        activation=activation,
        hidden_dropout=0.1,
    )
    placement = Placement(
        build_groups(ParallelDims(tensor=2)).tensor,
        sequence_parallel=True,
        dtype=torch.float64,
        symmetric_memory=overlap,
    )
    model = build_model(config, placement, device=torch.device("cpu"), backend=backend)
    init_parameters(model.named_parameters(), config, placement, seed=1)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(61, (3, 16), generator=generator)
    weights = torch.ones(3, 16, dtype=torch.float64)
    inputs = ModelInputs(tokens, tokens.roll(-1, dims=1), weights, torch.arange(3))
    loss = model(inputs, RngStreams(1, inputs.samples))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}
