"""The same weights give transformers' BLOOM the same logits and the same text.

transformers computes the softmax in float32, and so are its ALiBi slopes and their products with
positions, whatever the dtype of the model. To compare in float64, ``lifted`` takes these two places
of its module to float64.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import BloomConfig, BloomForCausalLM
from transformers.models.bloom import modeling_bloom

from megatron.checkpoint.huggingface import (
    bloom_config,
    check_exportable,
    transformers_name,
    write_config,
    write_weights,
)
from megatron.checkpoint.load import open_checkpoint
from megatron.config import ModelConfig
from megatron.errors import CheckpointError, ConfigError
from megatron.inference.generation import Sampling, generate
from megatron.model.alibi import alibi_slopes
from megatron.model.language_model import BloomForPretraining
from tests.distributed import run_ranks
from tests.figures import Figure
from tests.megatron.model.sample import SMALL, save_model, small_model, weights, with_options

TOKEN_IDS = {"unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
NO_TOKENS = dict.fromkeys(TOKEN_IDS)
# With weights of the usual size, so that differences are those of a usual model.
BLOOM = with_options(init_std=None)
CONFIGS = [
    replace(BLOOM, num_heads=5, hidden_size=35, num_layers=3, vocab_size=101),
    replace(BLOOM, num_heads=8, hidden_size=72, num_layers=1, vocab_size=63),
    replace(
        BLOOM, num_heads=12, hidden_size=84, num_layers=2, vocab_size=257, tie_embeddings=False
    ),
]
PROMPT = [7, 1, 30, 22]
NEW_TOKENS = 20


def name_of(config: ModelConfig) -> str:
    return f"{config.num_heads} heads"


def transformers_model(ours: BloomForPretraining, dtype: torch.dtype) -> BloomForCausalLM:
    """transformers' model with the weights of ``ours``."""
    theirs = BloomForCausalLM(BloomConfig(**bloom_config(ours.config, NO_TOKENS, dtype))).to(dtype)
    state = {transformers_name(name): weight for name, weight in weights(ours).items()}
    found = theirs.load_state_dict(state, strict=False)
    assert found.unexpected_keys == []
    assert found.missing_keys == (["lm_head.weight"] if ours.config.tie_embeddings else [])
    return theirs.eval()


@pytest.fixture
def lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' BLOOM compute in float64 throughout."""

    def softmax(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        return F.softmax(x, dim=dim)

    def slopes(num_heads: int, device: torch.device) -> Tensor:
        return alibi_slopes(num_heads).double()

    def build_alibi(mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        positions = (mask.cumsum(-1) - 1) * mask
        bias = slopes(num_heads, mask.device)[:, None] * positions[:, None]
        return bias.view(len(mask) * num_heads, 1, -1).to(dtype)

    monkeypatch.setattr(modeling_bloom, "F", SimpleNamespace(**{**vars(F), "softmax": softmax}))
    # Earlier versions of transformers have slopes in the second only.
    monkeypatch.setattr(modeling_bloom, "_get_alibi_slopes", slopes, raising=False)
    monkeypatch.setattr(modeling_bloom, "build_alibi_tensor", build_alibi)


def ids(config: ModelConfig) -> Tensor:
    return torch.randint(config.vocab_size, (2, 150))


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    if isinstance(model, BloomForPretraining):
        return model.logits(tokens)[..., : model.config.vocab_size]
    return model(tokens).logits


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_logits_agree_in_float32(
    single_group: ProcessGroup, config: ModelConfig, figure: Figure
) -> None:
    ours = small_model(single_group, config, dtype=torch.float32)
    theirs, tokens = transformers_model(ours, torch.float32), ids(config)
    want = logits(theirs, tokens)
    difference = float((logits(ours, tokens) - want).abs().max())
    figure(f"HF parity, {name_of(config)}, fp32", difference=difference, logit=float(want.max()))
    assert difference <= 1e-5


@pytest.mark.usefixtures("lifted")
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_logits_agree_in_float64(
    single_group: ProcessGroup, config: ModelConfig, figure: Figure
) -> None:
    ours = small_model(single_group, config)
    theirs, tokens = transformers_model(ours, torch.float64), ids(config)
    difference = float((logits(ours, tokens) - logits(theirs, tokens)).abs().max())
    figure(f"HF parity, {name_of(config)}, fp64", difference=difference)
    assert difference <= 1e-10


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_bf16_is_as_near_as_its_rounding(
    single_group: ProcessGroup, config: ModelConfig, figure: Figure
) -> None:
    config = replace(config, alibi_precision="bloom_bf16")
    ours = small_model(single_group, config, dtype=torch.bfloat16)
    tokens = ids(config)
    low = logits(transformers_model(ours, torch.bfloat16), tokens).float()
    rounding = float((logits(transformers_model(ours, torch.float32), tokens) - low).norm())
    difference = float((logits(ours, tokens).float() - low).norm())
    figure(f"HF parity, {name_of(config)}, bf16", difference=difference, rounding=rounding)
    assert difference <= rounding


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_greedy_text_is_the_same(single_group: ProcessGroup, config: ModelConfig) -> None:
    # Small weights repeat one token.
    config = replace(config, init_std=0.5)
    theirs = transformers_model(
        small_model(single_group, config, dtype=torch.float32), torch.float32
    )
    prompt = torch.tensor([PROMPT])
    out = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )
    want = out[0, len(PROMPT) :].tolist()
    assert len(set(want)) > 1
    sizes = [1] if config.num_heads % 2 else [1, 2]
    for size in sizes:
        assert run_ranks(size, greedy_tokens, config) == [want] * size


def greedy_tokens(config: ModelConfig) -> list[int]:
    group = dist.group.WORLD
    assert group is not None
    model = small_model(group, config, dtype=torch.float32)
    greedy = Sampling(greedy=True)
    return list(generate(model, PROMPT, max_new_tokens=NEW_TOKENS, sampling=greedy))


def test_config_says_what_the_model_is() -> None:
    config = bloom_config(SMALL, TOKEN_IDS, torch.bfloat16)
    opened = BloomConfig(**config)
    assert opened.n_layer == 2
    assert opened.n_head == 4
    assert opened.hidden_size == 32
    assert opened.vocab_size == 97
    assert opened.layer_norm_epsilon == 1e-5
    assert opened.tie_word_embeddings is True
    assert opened.hidden_dropout == opened.attention_dropout == 0
    assert opened.dtype == torch.bfloat16
    assert {name: getattr(opened, name) for name in TOKEN_IDS} == TOKEN_IDS
    assert config["model_type"] == "bloom"
    assert config["architectures"] == ["BloomForCausalLM"]


def test_dropout_of_the_training_is_not_exported() -> None:
    model = with_options(hidden_dropout=0.1, attention_dropout=0.2)
    assert bloom_config(model, NO_TOKENS, torch.float32) == bloom_config(
        SMALL, NO_TOKENS, torch.float32
    )


def test_generation_config_has_the_tokens_that_generation_uses(tmp_path: Path) -> None:
    write_config(tmp_path, bloom_config(SMALL, TOKEN_IDS, torch.float32))
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_embedding": "rotary"}, "model.position_embedding must be alibi, got rotary"),
        ({"activation": "swiglu"}, "model.activation must be gelu, got swiglu"),
        ({"ffn_hidden_size": 96}, "model.ffn_hidden_size must be 128, got 96"),
        ({"embedding_layernorm": False}, "model.embedding_layernorm must be True, got False"),
        ({"num_token_types": 2}, "model.num_token_types must be 0, got 2"),
        ({"pooler": True}, "model.pooler must be False, got True"),
    ],
)
def test_model_that_bloom_cannot_express_is_refused(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_exportable(with_options(**options))


def test_all_that_is_in_the_way_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_exportable(with_options(position_embedding="none", pooler=True))
    assert "model.position_embedding" in str(caught.value)
    assert "model.pooler" in str(caught.value)


def test_untied_model_with_dropout_is_exportable() -> None:
    check_exportable(with_options(tie_embeddings=False, hidden_dropout=0.1))


def test_unknown_parameter_is_refused() -> None:
    with pytest.raises(CheckpointError, match="lm.pooler.dense.weight"):
        transformers_name("lm.pooler.dense.weight")


def test_weights_are_split_over_files_with_an_index(tmp_path: Path) -> None:
    (path, *_) = run_ranks(2, save_model, tmp_path)
    reader = open_checkpoint(path)
    for folder, limit in (("one", 10**9), ("many", 20_000)):
        (tmp_path / folder).mkdir()
        write_weights(reader, tmp_path / folder, torch.float32, max_shard_size=limit)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["weight_map"].keys() == whole.keys()
    for name, weight in whole.items():
        part = load_file(tmp_path / "many" / index["weight_map"][name])
        assert torch.equal(part[name], weight)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["model.safetensors"]


def test_padding_of_the_vocabulary_is_not_exported(tmp_path: Path) -> None:
    (path, *_) = run_ranks(2, save_model, tmp_path)
    write_weights(open_checkpoint(path), tmp_path, torch.bfloat16)
    embedding = load_file(tmp_path / "model.safetensors")["transformer.word_embeddings.weight"]
    assert embedding.shape == (97, 32)
    assert embedding.dtype == torch.bfloat16
