"""Operations of a training step: the formula against a count of the products that run.

    python -m megatron.benchmarks.flops [--json FILE]

The published BLOOM models, forward and backward pass of one sequence, on meta tensors: torch counts
each matrix product by its shapes, and nothing is computed. Attention runs by its definition, which
multiplies masked scores too, so that the formula to compare with is that of full attention.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron.benchmarks.program import Run, run_benchmark
from megatron.cli import run_tool
from megatron.config import ModelConfig
from megatron.launch import Launch
from megatron.model.flops import count_parameters, flops_per_token
from megatron.model.inputs import ModelInputs
from megatron.model.language_model import BloomForPretraining
from megatron.model.placement import Placement
from megatron.report.tables import Row, Table


def bloom(num_layers: int, hidden_size: int, num_heads: int) -> ModelConfig:
    """A published BLOOM."""
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        vocab_size=250_880,
        seq_length=2048,
    )


BLOOM = {
    "560m": bloom(24, 1024, 16),
    "1b1": bloom(24, 1536, 16),
    "1b7": bloom(24, 2048, 16),
    "3b": bloom(30, 2560, 32),
    "7b1": bloom(30, 4096, 32),
    "176b": bloom(70, 14336, 112),
}

_QUICK_LENGTH = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    description = "Operations by formula and by count."
    return run_benchmark("flops", description, measure, argv, timed=False)


def measure(run: Run) -> Iterator[Table]:
    """The table of all models."""
    models = BLOOM
    if run.quick:
        models = {name: replace(model, seq_length=_QUICK_LENGTH) for name, model in BLOOM.items()}
    rows = list(compare(models, run.alone(count_models, list(models.values()))))
    yield Table("Operations to train on one token", rows)


def compare(models: dict[str, ModelConfig], counts: Sequence[int]) -> Iterator[Row]:
    """One row for each model."""
    for (name, config), count in zip(models.items(), counts, strict=True):
        formula, counted = flops_per_token(config, "full"), count / config.seq_length
        yield {
            "model": name,
            "parameters": count_parameters(config),
            "GFLOP by formula": formula / 1e9,
            "GFLOP counted": counted / 1e9,
            "difference": f"{abs(formula - counted) / counted:.4%}",
        }


def count_models(launch: Launch, configs: Sequence[ModelConfig]) -> list[int]:
    """Operations of one training sequence of each model."""
    return [_count(launch, config) for config in configs]


def _count(launch: Launch, config: ModelConfig) -> int:
    with torch.device("meta"):
        model = BloomForPretraining(config, Placement(launch.groups.tensor), backend="explicit")
        tokens = torch.zeros(1, config.seq_length, dtype=torch.int64)
        weights, samples = torch.ones(tokens.shape), torch.zeros(1)
    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter:
        model(ModelInputs(tokens, tokens, weights, samples)).backward()
    return counter.get_total_flops()


def _product_flops(total: torch.Size, a: torch.Size, b: torch.Size, out_shape: torch.Size) -> int:
    return 2 * a[0] * a[1] * b[1]


_IN_PLACE: dict[object, Callable[..., int]] = {torch.ops.aten.addmm_: _product_flops}
"""Products that add to a gradient in place, the cost of which torch does not know."""


if __name__ == "__main__":
    run_tool(main)
