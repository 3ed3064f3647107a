"""From a save of any layout to a model that computes at this one."""

from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch.distributed import ProcessGroup

from megatron.checkpoint.folders import find_latest
from megatron.checkpoint.format import MANIFEST, StateTensor
from megatron.checkpoint.load import CheckpointReader
from megatron.config import Config
from megatron.errors import CheckpointError
from megatron.model.init import build_model
from megatron.model.language_model import BloomForPretraining
from megatron.model.placement import Placement
from megatron.tokenizer import Tokenizer, load_tokenizer
from mpu import shard_spec

TOKENIZER_FOLDER = "tokenizer"
"""Where a save keeps the files of the tokenizer."""


def find_checkpoint(path: Path) -> Path:
    """``path`` itself if it is a save, or the newest valid save of the run folder ``path``.

    Raises:
        CheckpointError: if it is neither.
    """
    if (path / MANIFEST).exists():
        return path
    latest = find_latest(path)
    if latest is None:
        raise CheckpointError(f"{path}: is no checkpoint, and no folder with a valid one")
    return latest


def saved_config(reader: CheckpointReader) -> Config:
    """The config of the run that wrote the save.

    Raises:
        CheckpointError: if it does not pass for a config.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config, "run")
    try:
        values = parser.parse_object({"run": dict(reader.config)})
        config: Config = parser.instantiate_classes(values).run
    except (ArgumentError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{reader.path}: its config cannot be used: {reason}") from error
    return config


def saved_tokenizer(reader: CheckpointReader) -> Tokenizer | None:
    """The tokenizer that the save holds, if it does.

    Raises:
        DataError: if its files are no tokenizer.
    """
    files = [PurePosixPath(name) for name in reader.files]
    files = [name for name in files if name.parts[0] == TOKENIZER_FOLDER]
    if not files:
        return None
    with TemporaryDirectory() as folder:
        for name in files:
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(reader.file(str(name)))
        return load_tokenizer(Path(folder) / TOKENIZER_FOLDER)


def load_model(
    reader: CheckpointReader,
    group: ProcessGroup,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> BloomForPretraining:
    """The saved model, cut over ``group`` whatever layout saved it, and rounded to ``dtype``.

    Collective over ``group``, which the save was opened with too, or by each rank for itself.

    Raises:
        CheckpointError: on every rank, if the weights are not those of the config's model.
        ConfigError: if the model cannot be cut into so many parts.
    """
    config = saved_config(reader).model
    model = build_model(config, Placement(group, dtype=dtype), device=device)
    for parameter in model.parameters():
        # Reading leaves the padding of the vocabulary as it is.
        parameter.detach().zero_()
    reader.read_weights_into(_weight_targets(model))
    return model.requires_grad_(False).eval()


def _weight_targets(model: BloomForPretraining) -> list[StateTensor]:
    """The parameters of ``model`` as what a reader fills."""
    group = model.placement.group
    targets = []
    for name, parameter in model.named_parameters():
        spec = shard_spec(parameter)
        pieces = tuple(spec.pieces(group.rank(), group.size()))
        targets.append(
            StateTensor("weight", name, spec.shape, pieces, parameter.detach(), owned=False)
        )
    return targets
