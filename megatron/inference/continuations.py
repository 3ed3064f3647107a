"""Texts continued by a save, on the ranks of a launch."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.checkpoint.load import open_checkpoint
from megatron.errors import DataError
from megatron.inference.generation import Sampling, generate
from megatron.inference.load import find_checkpoint, load_model, saved_config, saved_tokenizer
from megatron.launch import Launch
from megatron.plain import read_file
from megatron.together import run_everywhere, run_on_first


def continuations(
    checkpoint: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    launch: Launch,
) -> Iterator[str]:
    """Each of ``prompts`` with its continuation, up to the end of the document.

    Collective over all ranks, which are one tensor group.

    Raises:
        CheckpointError: if there is no checkpoint, or it is damaged.
        DataError: if it holds no tokenizer.
        ConfigError: if its model does not divide by the number of ranks.
    """
    group = launch.groups.tensor
    path = run_on_first(lambda: find_checkpoint(checkpoint), group)
    reader = open_checkpoint(path, group=group)
    config = saved_config(reader, tensor=group.size())
    tokenizer = run_everywhere(lambda: saved_tokenizer(reader), group)
    if tokenizer is None:
        raise DataError(f"{reader.path}: holds no tokenizer; the run had no data.tokenizer")
    model = load_model(
        reader, config.model, group, dtype=config.train.torch_dtype, device=launch.device
    )
    eod_id = tokenizer.eod_id
    for prompt in prompts:
        tokens = tokenizer.encode(prompt)
        new = generate(
            model,
            tokens or [eod_id],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            eod_id=eod_id,
        )
        yield tokenizer.decode([*tokens, *(token for token in new if token != eod_id)])


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        return read_file(path).decode().splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
