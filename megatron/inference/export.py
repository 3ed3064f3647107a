"""Export a save as a BLOOM model that transformers opens.

What is written is opened again by transformers, and its logits are compared with those of the model
in the checkpoint. Only if they agree does the output appear. Both models are held in float32 for
that; rounding to bfloat16 is done to the weights of both.
"""

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import BloomForCausalLM

from megatron.atomic import make_folder
from megatron.checkpoint.huggingface import (
    bloom_config,
    check_exportable,
    write_config,
    write_weights,
)
from megatron.checkpoint.load import CheckpointReader
from megatron.config import LaunchConfig, ModelConfig
from megatron.errors import CheckpointError, ConfigError, DiskError
from megatron.inference.load import load_model, saved_config, saved_tokenizer
from megatron.launch import RankEnvironment, launched
from megatron.tokenizer import SPECIAL_NAMES, Tokenizer, load_tokenizer
from mpu import ParallelDims

TEXT = "The quick brown fox jumps over 12 lazy dogs.\n\tNa\u00efve caf\u00e9: \u4e2d\u6587"
SAMPLE_LENGTHS = (1, 33, 160)


def export(
    reader: CheckpointReader,
    output: Path,
    dtype: torch.dtype,
    tolerance: float,
    *,
    overwrite: bool = False,
) -> float:
    """Write the folder ``output`` and return how far its logits are from the checkpoint's.

    That is the largest difference, as a part of the largest logit where it is above 1.

    Args:
        overwrite: an export that is there is replaced.

    Raises:
        ConfigError: if ``output`` exists and is not to be replaced, or is no export, or the model
            is none that transformers' BLOOM expresses.
        DataError: if the tokenizer cannot be written for transformers.
        CheckpointError: if what was written is not equal to what was read; it is removed.
        DiskError: if the output cannot be written.
    """
    if os.path.lexists(output):
        _check_replaceable(output, overwrite)
    # transformers rounds the ALiBi bias to the dtype that it computes in, which is float32 here.
    model = replace(saved_config(reader).model, alibi_precision="exact")
    check_exportable(model)
    tokenizer = saved_tokenizer(reader)
    with _appearing(output) as folder:
        try:
            write_weights(reader, folder, dtype)
            write_config(folder, bloom_config(model, _token_ids(tokenizer), dtype))
            if tokenizer is not None:
                tokenizer.export_transformers(folder)
        except (OSError, SafetensorError) as error:
            raise DiskError(f"{output}: cannot be written: {error}") from error
        samples = _random_samples(model.vocab_size)
        if tokenizer is not None:
            samples.append(_encoded_sample(tokenizer, folder))
        difference = _difference(reader, model, folder, dtype, samples)
        # So that NaN is refused too.
        if not difference <= tolerance:
            raise CheckpointError(
                f"{reader.path}: transformers computes other logits from the export: "
                f"they differ by {difference:.2e}, and --tolerance is {tolerance:.2e}"
            )
    return difference


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A folder that takes the name ``output`` when the body ends, or is removed when it fails."""
    temporary = output.with_name(f".{output.name}.tmp-{secrets.token_hex(4)}")
    make_folder(temporary)
    replaced = temporary.with_name(f"{temporary.name}-replaced")
    try:
        yield temporary
        if output.exists():
            output.rename(replaced)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _check_replaceable(output: Path, overwrite: bool) -> None:
    """Refuse to take the place of anything but an export, and of that unless it is asked for."""
    if not overwrite:
        raise ConfigError(f"--output {output}: exists already; choose a new folder")
    is_export = (output / "config.json").is_file() and not output.is_symlink()
    if not is_export or any(path.is_dir() for path in output.iterdir()):
        raise ConfigError(f"--output {output}: is not an export; --overwrite replaces nothing else")


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """The ids of the special tokens as transformers names them; None for those that are not."""
    if tokenizer is None:
        return {f"{role}_id": None for role in SPECIAL_NAMES}
    vocabulary = tokenizer.vocabulary
    found = {
        f"{role}_id": next((vocabulary[name] for name in names if name in vocabulary), None)
        for role, names in SPECIAL_NAMES.items()
    }
    return {**found, "eos_token_id": tokenizer.eod_id}


def _random_samples(vocab_size: int) -> list[Tensor]:
    """Sequences of tokens, ``(1, seq)``, always the same."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(vocab_size, (1, length), generator=generator) for length in SAMPLE_LENGTHS
    ]


def _encoded_sample(tokenizer: Tokenizer, folder: Path) -> Tensor:
    """The tokens of a text, ``(1, seq)``, which the tokenizer in ``folder`` must agree on."""
    tokens = tokenizer.encode(TEXT)
    if load_tokenizer(folder).encode(TEXT) != tokens:
        raise CheckpointError(f"{tokenizer.path}: transformers encodes a text to other tokens")
    return torch.tensor([tokens])


@torch.no_grad()
def _difference(
    reader: CheckpointReader,
    model: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    samples: Sequence[Tensor],
) -> float:
    """Largest difference of logits between the checkpoint and the export in ``folder``."""
    with launched(
        lambda _: ParallelDims(), LaunchConfig(device="cpu"), RankEnvironment()
    ) as launch:
        ours = load_model(
            reader, model, launch.groups.tensor, dtype=torch.float32, device=launch.device
        )
        for parameter in ours.parameters():
            parameter.copy_(parameter.to(dtype))
        theirs = BloomForCausalLM.from_pretrained(
            str(folder), local_files_only=True, dtype=torch.float32
        ).eval()
        distances = [
            _distance(ours.logits(tokens)[..., : model.vocab_size], theirs(tokens).logits)
            for tokens in samples
        ]
        return float(torch.stack(distances).max())


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Largest difference of two tensors, as a part of the largest element where it is above 1."""
    return (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)
