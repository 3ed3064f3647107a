"""From a save to what transformers opens as a BLOOM model.

    ours                                                  transformers'
    language_model.embedding.word_embeddings.*            transformer.word_embeddings.*
    language_model.embedding.word_embeddings_layernorm.*  transformer.word_embeddings_layernorm.*
    language_model.transformer.layers.N.*                 transformer.h.N.*
    language_model.transformer.final_layernorm.*          transformer.ln_f.*
    output_layer.weight                                   lm_head.weight, if it is not tied

Inside a layer the names are BLOOM's already, and so are the orders of rows. Shapes are those of
whole parameters, without the padding of the vocabulary.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from megatron.checkpoint.format import StoredTensor
from megatron.checkpoint.load import CheckpointReader
from megatron.config import ModelConfig
from megatron.errors import CheckpointError, ConfigError, NonFiniteError

PREFIXES = {
    "language_model.embedding.word_embeddings.": "transformer.word_embeddings.",
    "language_model.embedding.word_embeddings_layernorm.": "transformer.word_embeddings_layernorm.",
    "language_model.transformer.layers.": "transformer.h.",
    "language_model.transformer.final_layernorm.": "transformer.ln_f.",
    "output_layer.": "lm_head.",
}

MAX_SHARD_SIZE = 5 * 10**9
"""Bytes of weights in one file, which is also what writing them holds in memory."""


def transformers_name(name: str) -> str:
    """What transformers calls our parameter ``name``.

    Raises:
        CheckpointError: if BLOOM has no such parameter.
    """
    for ours, theirs in PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise CheckpointError(f"{name}: transformers' BLOOM has no parameter that this could become")


def check_exportable(model: ModelConfig) -> None:
    """Refuse a model that transformers' BLOOM cannot express.

    Raises:
        ConfigError: naming every option in the way.
    """
    rules: list[tuple[str, object, object]] = [
        ("position_embedding", model.position_embedding, "alibi"),
        ("activation", model.activation, "gelu"),
        ("ffn_hidden_size", model.ffn_size, 4 * model.hidden_size),
        ("embedding_layernorm", model.embedding_layernorm, True),
        ("num_token_types", model.num_token_types, 0),
        ("pooler", model.pooler, False),
    ]
    broken = [
        f"model.{name} must be {wanted}, got {found}"
        for name, found, wanted in rules
        if found != wanted
    ]
    if broken:
        raise ConfigError(f"transformers' BLOOM cannot express this model: {'; '.join(broken)}")


def bloom_config(
    model: ModelConfig, token_ids: Mapping[str, int | None], dtype: torch.dtype
) -> dict[str, Any]:
    """The fields of config.json.

    Args:
        model: an exportable model.
        token_ids: bos_token_id, eos_token_id, pad_token_id and unk_token_id.
        dtype: of the exported weights.
    """
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "seq_length": model.seq_length,
        "layer_norm_epsilon": model.layernorm_epsilon,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": model.tie_embeddings,
        # Dropout is how a model was trained, not what it is.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "dtype": str(dtype).removeprefix("torch."),
        **token_ids,
    }


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json and generation_config.json from what ``bloom_config`` gave."""
    ids = {name: value for name, value in config.items() if name.endswith("_token_id")}
    # The token for unknown words takes no part in generation.
    ids.pop("unk_token_id", None)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", ids)


def write_weights(
    reader: CheckpointReader,
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write the weights of a save as model.safetensors, or as several files and their index.

    One file after the other is in memory. The same weights give the same bytes, whatever layout
    saved them.

    Raises:
        NonFiniteError: if a weight is not finite, as saved or as rounded to ``dtype``.
    """
    weights = {
        transformers_name(name): stored
        for (kind, name), stored in sorted(reader.tensors.items())
        if kind == "weight"
    }

    def num_bytes(stored: StoredTensor) -> int:
        return math.prod(stored.shape) * dtype.itemsize

    plan = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {name: _read(reader, weights[name].name, dtype) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        # The library makes its files for this user alone; the umask has made the folder.
        (folder / file).chmod(folder.stat().st_mode & 0o666)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _read(reader: CheckpointReader, name: str, dtype: torch.dtype) -> torch.Tensor:
    weight = reader.read("weight", name).to(dtype)
    if not weight.isfinite().all():
        raise NonFiniteError(
            f"{reader.path}: in {dtype}, the weight of {name} is not finite: no model to export"
        )
    return weight


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")
