"""From a save of any layout to a model that computes at this one."""

import math
import os
from dataclasses import replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import torch
from torch.distributed import ProcessGroup

from megatron.checkpoint.folders import STEP_FOLDER, find_latest
from megatron.checkpoint.format import MANIFEST
from megatron.checkpoint.load import CheckpointReader
from megatron.config import Config, ModelConfig, ParallelConfig, config_from_dict
from megatron.errors import CheckpointError, ConfigError, NonFiniteError
from megatron.model.flops import count_parameters
from megatron.model.init import build_model
from megatron.model.language_model import BloomForPretraining
from megatron.model.placement import Placement
from megatron.tokenizer import Tokenizer, load_tokenizer
from megatron.training.finite import check_finite
from megatron.training.run_folder import check_run_folder
from megatron.training.saving import CHECKPOINTS, TOKENIZER
from mpu import ShardedTensor, shard_spec


def find_checkpoint(path: Path) -> Path:
    """``path`` itself if it is a save, or the newest save of the run with folder ``path``.

    Damaged ones too: opening them tells, and an older one is for the user to name.

    Raises:
        CheckpointError: if it is neither.
    """
    if STEP_FOLDER.fullmatch(path.name) or os.path.lexists(path / MANIFEST):
        return path
    check_run_folder(path)
    latest = find_latest(path / CHECKPOINTS)
    if latest is None:
        raise CheckpointError(f"{path}: is neither a checkpoint nor a run folder with one")
    return latest


def saved_config(reader: CheckpointReader, *, tensor: int = 1) -> Config:
    """The config of the run that wrote the save, with ``tensor`` ranks that share each layer.

    Raises:
        CheckpointError: if it does not pass for a config.
        ConfigError: if the model does not divide by so many ranks.
    """
    try:
        config = config_from_dict(reader.config)
    except ConfigError as error:
        raise CheckpointError(
            f"{reader.path}: its config cannot be used: {error}", on_every_rank=True
        ) from error
    return replace(config, parallel=ParallelConfig(tensor=tensor))


def saved_tokenizer(reader: CheckpointReader) -> Tokenizer | None:
    """The tokenizer that the save holds, if it does.

    It is read from a copy of the files that have been checked, whatever else lies beside them.

    Raises:
        DataError: if its files are no tokenizer.
    """
    files = [PurePosixPath(name) for name in reader.files]
    files = [name for name in files if name.parts[0] == TOKENIZER]
    if not files:
        return None
    with TemporaryDirectory() as folder:
        for name in files:
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(reader.file(str(name)))
        tokenizer = load_tokenizer(Path(folder) / TOKENIZER)
    # What errors shall name: the copy is gone.
    tokenizer.path = reader.path / TOKENIZER
    return tokenizer


def load_model(
    reader: CheckpointReader,
    config: ModelConfig,
    group: ProcessGroup,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> BloomForPretraining:
    """The saved weights, rounded to ``dtype``, as a model that is cut over ``group``.

    Collective over the group that the save was opened with.

    Args:
        config: of the model, from ``saved_config``.

    Raises:
        CheckpointError: on every rank, if the weights are not those of such a model.
        NonFiniteError: on every rank, if one of them is not finite, as saved or as rounded.
    """
    _check_size(reader, config)
    # Of those that take cached keys, the one that never holds all scores of a long prompt.
    model = build_model(config, Placement(group, dtype=dtype), device=device, backend="blocked")
    for parameter in model.parameters():
        # Reading leaves the padding of the vocabulary as it is.
        parameter.detach().zero_()
    targets = _weight_targets(model)
    reader.read_weights_into(targets)
    try:
        check_finite(targets, device, group=group)
    except NonFiniteError as error:
        raise NonFiniteError(f"{reader.path}: in {dtype}, {error}", on_every_rank=True) from error
    return model.requires_grad_(False).eval()


def _check_size(reader: CheckpointReader, config: ModelConfig) -> None:
    """Refuse a config of another model before memory is taken for it."""
    weights = [tensor for tensor in reader.tensors.values() if tensor.kind == "weight"]
    held, wanted = sum(math.prod(it.shape) for it in weights), count_parameters(config)
    # A smaller difference is told by the names of the weights.
    if wanted > 2 * held:
        raise CheckpointError(
            f"{reader.path}: is of another model: its config describes {wanted} parameters, but it "
            f"holds {held}",
            on_every_rank=True,
        )


def _weight_targets(model: BloomForPretraining) -> list[ShardedTensor]:
    """The parameters of ``model`` as what a reader fills."""
    group = model.placement.group
    targets = []
    for name, parameter in model.named_parameters():
        spec = shard_spec(parameter)
        boxes = spec.boxes(parameter.detach(), group.rank(), group.size())
        targets.append(ShardedTensor("weight", name, spec.shape, boxes, owned=False))
    return targets
