"""Small models for the tests of this folder and of the tools."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.checkpoint.save import save_checkpoint
from megatron.config import (
    Backend,
    Config,
    ModelConfig,
    ParallelConfig,
    Recompute,
    TrainConfig,
    config_to_dict,
)
from megatron.model.init import build_model, init_parameters
from megatron.model.language_model import BloomForPretraining
from megatron.model.placement import Placement
from megatron.tokenizer import load_tokenizer
from mpu import Box, ShardedTensor, shard_spec
from tests.shards import cut

SMALL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    vocab_size=97,
    seq_length=24,
    vocab_padding_multiple=8,
    init_std=0.5,
)


def small_model(
    group: ProcessGroup,
    config: ModelConfig = SMALL,
    *,
    dtype: torch.dtype = torch.float64,
    backend: Backend = "blocked",
    recompute: Recompute = "none",
) -> BloomForPretraining:
    """An initialised model on the CPU, every parameter of which does something.

    Biases and layer norms are moved from the 0 and 1 that would hide mistakes.
    """
    placement = Placement(group, dtype=dtype)
    model = build_model(
        config, placement, device=torch.device("cpu"), backend=backend, recompute=recompute
    )
    init_parameters(model.named_parameters(), config, placement, seed=1)
    scatter_vectors(model, group)
    return model


def scatter_vectors(model: BloomForPretraining, group: ProcessGroup) -> None:
    """Add noise to all one-dimensional parameters, the same at every size of ``group``."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            spec = shard_spec(parameter)
            noise = torch.randn(spec.shape, generator=generator, dtype=torch.float64) / 8
            with torch.no_grad():
                parameter.add_(cut(noise, spec, group.rank(), group.size()))


def with_options(**options: object) -> ModelConfig:
    """The small model with other options."""
    return replace(SMALL, **options)  # type: ignore[arg-type]


LAST_WEIGHT = "language_model.transformer.final_layernorm.bias"


def save_model(
    folder: Path,
    config: ModelConfig = SMALL,
    tokenizer: Path | None = None,
    last_number: float | None = None,
) -> Path:
    """Save a small model, cut over all ranks, as a run with ``folder`` would; the save's path.

    Collective: a body for ``run_ranks``. Beside the weights there is one tensor of the optimizer.

    Args:
        last_number: what the last number of the last weight shall be.
    """
    group = dist.group.WORLD
    assert group is not None
    rank, size = group.rank(), group.size()
    run = Config(
        folder=folder,
        model=config,
        parallel=ParallelConfig(tensor=size),
        train=TrainConfig(samples=8, global_batch_size=2),
    )
    tensors = []
    for name, parameter in small_model(group, config, dtype=torch.float32).named_parameters():
        spec = shard_spec(parameter)
        boxes = spec.boxes(parameter.detach(), rank, size)
        if last_number is not None and name == LAST_WEIGHT:
            boxes[-1].tensor[-1] = last_number
        owned = spec.dim is not None or rank == 0
        tensors.append(ShardedTensor("weight", name, spec.shape, boxes, owned))
    first = tensors[0]
    moments = tuple(Box(box.start, box.tensor.clone()) for box in first.boxes)
    tensors.append(replace(first, kind="exp_avg", boxes=moments))
    files = {} if tokenizer is None else load_tokenizer(tokenizer).files()
    return save_checkpoint(
        folder / "checkpoints",
        4,
        tensors,
        state={"step": 4, "consumed_samples": 8},
        config=config_to_dict(run),
        layout={"tensor": size},
        files={f"tokenizer/{name}": content for name, content in files.items()},
        group=group,
        keep_last=0,
    )


def weights(model: BloomForPretraining) -> dict[str, Tensor]:
    """The whole weights of a model on one rank, by name, without padding."""
    found = {}
    for name, parameter in model.named_parameters():
        (box,) = shard_spec(parameter).boxes(parameter.detach(), 0, 1)
        found[name] = box.tensor
    return found
