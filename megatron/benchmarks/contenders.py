"""One training step by several programs: ours, transformers', a plain one, Megatron-Core's.

    ours           TorchEngine.train_step, as a run calls it
    transformers   BloomForCausalLM
    plain          what one writes first: nn.Linear, torch's attention with a mask that has the
                   ALiBi bias, and F.cross_entropy of all logits
    Megatron-Core  its GPT, where it is installed; another model, see ``megatron_core``

The first three begin with the same weights. All learn from the same batch: forward and backward
pass, clipping to norm 1, AdamW in torch's fused form. In bf16 the others compute under autocast,
since all keep float32 weights.

Letters: b batch, s sequence, n heads, d head size, h hidden size.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.benchmarks import megatron_core
from megatron.checkpoint.huggingface import bloom_config, transformers_name
from megatron.config import (
    Config,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron.engine.base import Engine
from megatron.engine.torch_engine import TorchEngine
from megatron.launch import Launch
from megatron.model.alibi import alibi_slopes
from megatron.model.inputs import ModelInputs
from megatron.tuning.attention import choose_backend
from mpu import ParallelGroups, ShardedTensor

Contender: TypeAlias = Literal["ours", "plain", "transformers", "Megatron-Core"]
Step: TypeAlias = Callable[[Tensor], float]
"""One training step on tokens ``(b, s)``; returns the loss before it."""
State: TypeAlias = Mapping[str, Tensor]

LR = 1e-4
MAX_NORM = 1.0

_NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"))


@dataclass(frozen=True)
class Shape:
    """What is trained on; ``batch`` sequences, in ``microbatches`` equal parts."""

    model: ModelConfig
    batch: int
    dtype: Literal["fp32", "bf16"] = "fp32"
    microbatches: int = 1

    @property
    def tokens(self) -> int:
        return self.batch * self.model.seq_length


def draw_tokens(shape: Shape, device: torch.device) -> Tensor:
    """Random ids ``(b, s)``, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.model.seq_length)
    return torch.randint(shape.model.vocab_size, size, generator=generator).to(device)


def build_engine(
    shape: Shape,
    groups: ParallelGroups,
    device: torch.device,
    parallel: ParallelConfig | None = None,
) -> TorchEngine:
    """Our engine with freshly drawn weights; default: cut over the tensor group."""
    config = make_config(shape, parallel or ParallelConfig(tensor=groups.tensor.size()))
    choice = choose_backend(config, device, {}, group=groups.tensor)
    return TorchEngine(config, groups, device, choice.backend)


def make_config(
    shape: Shape, parallel: ParallelConfig, engine: EngineConfig | None = None
) -> Config:
    """A run of steps of ``shape``."""
    return Config(
        folder=Path("unused"),
        model=shape.model,
        parallel=parallel,
        engine=engine or EngineConfig(),
        train=TrainConfig(
            samples=shape.batch,
            global_batch_size=shape.batch,
            micro_batch_size=shape.batch // shape.microbatches,
            dtype=shape.dtype,
        ),
        optimizer=OptimizerConfig(lr=LR, max_grad_norm=MAX_NORM),
    )


def engine_step(engine: Engine, lr: float = LR, microbatches: int = 1) -> Step:
    """A step of ours."""

    def step(tokens: Tensor) -> float:
        return engine.train_step(build_inputs(tokens, microbatches), lr).loss

    return step


def build_inputs(tokens: Tensor, microbatches: int) -> list[ModelInputs]:
    """Each token predicts the next one, and the last one nothing."""
    weights = torch.ones(tokens.shape, device=tokens.device)
    weights[:, -1] = 0
    samples = torch.arange(tokens.size(0), device=tokens.device)
    whole = (tokens, tokens.roll(-1, dims=1), weights, samples)
    parts = zip(*(tensor.chunk(microbatches) for tensor in whole), strict=True)
    return [ModelInputs(*part) for part in parts]


def transformers_state(engine: TorchEngine) -> State:
    """Our weights under the names that transformers has for them."""
    return {
        transformers_name(entry.name): _whole(entry)
        for entry in engine.state()
        if entry.kind == "weight"
    }


def _whole(entry: ShardedTensor) -> Tensor:
    """A copy of a tensor that one process holds all boxes of."""
    tensor = entry.boxes[0].tensor.new_empty(entry.shape)
    for box in entry.boxes:
        sizes = zip(box.start, box.tensor.shape, strict=True)
        tensor[tuple(slice(start, start + size) for start, size in sizes)] = box.tensor
    return tensor


def transformers_step(shape: Shape, state: State | None, device: torch.device) -> Step:
    """A step of transformers' BLOOM that begins with ``state``, or with weights of its own."""
    # Optional, and slow to import.
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(**bloom_config(shape.model, _NO_TOKENS, torch.float32), use_cache=False)
    with device:
        model = BloomForCausalLM(config)
    if state is not None:
        model.load_state_dict(state, strict=False)
    model.train()

    def loss(tokens: Tensor) -> Tensor:
        found: Tensor = model(input_ids=tokens, labels=tokens).loss
        return found

    return _module_step(model, loss, shape, device)


def plain_step(shape: Shape, state: State | None, device: torch.device) -> Step:
    """A step of the plain model that begins with ``state``, or with weights of its own."""
    with device:
        model = PlainBloom(shape.model)
    if state is not None:
        prefix = "transformer."
        model.load_state_dict({name.removeprefix(prefix): x for name, x in state.items()})
    return _module_step(model, model, shape, device)


def core_step(shape: Shape, device: torch.device) -> Step:
    """A step of Megatron-Core's GPT, with weights of its own."""
    model = megatron_core.CoreGpt(shape.model, device)
    return _module_step(model, model, shape, device)


def contenders_for(dtype: str, device: torch.device) -> list[Contender]:
    """Who is installed, and computes in ``dtype`` on ``device``.

    Megatron-Core's layers do not know of autocast on a CPU.
    """
    core = megatron_core.is_installed() and (dtype == "fp32" or device.type == "cuda")
    return [name for name in get_args(Contender) if name != megatron_core.NAME or core]


def build_step(contender: Contender, shape: Shape, launch: Launch) -> Step:
    """The step of ``contender``, which begins with weights of its own."""
    if contender == "Megatron-Core":
        return core_step(shape, launch.device)
    if contender == "plain":
        return plain_step(shape, None, launch.device)
    if contender == "transformers":
        return transformers_step(shape, None, launch.device)
    return engine_step(build_engine(shape, launch.groups, launch.device))


def _module_step(
    model: nn.Module, loss_of: Callable[[Tensor], Tensor], shape: Shape, device: torch.device
) -> Step:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step(tokens: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=shape.dtype == "bf16"):
            loss = loss_of(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        return loss.item()

    return step


class PlainBloom(nn.Module):
    """BLOOM in the fewest lines, with the parameter names of transformers' ``BloomModel``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.word_embeddings_layernorm = nn.LayerNorm(config.hidden_size)
        self.h = nn.ModuleList(_PlainLayer(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size)
        nn.init.normal_(self.word_embeddings.weight, std=config.initial_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean loss of the predictions of ``(b, s)`` tokens, a scalar."""
        x = self.word_embeddings_layernorm(self.word_embeddings(tokens))
        for layer in self.h:
            x = layer(x)
        logits = F.linear(self.ln_f(x), self.word_embeddings.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


class _PlainLayer(nn.Module):
    """One layer, ``(b, s, h)`` -> the same."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.input_layernorm = nn.LayerNorm(size)
        self.self_attention = _PlainAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(size)
        self.mlp = nn.ModuleDict(
            {
                "dense_h_to_4h": nn.Linear(size, config.ffn_size),
                "dense_4h_to_h": nn.Linear(config.ffn_size, size),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        y = self.mlp["dense_h_to_4h"](self.post_attention_layernorm(x))
        out: Tensor = x + self.mlp["dense_4h_to_h"](F.gelu(y, approximate="tanh"))
        return out


class _PlainAttention(nn.Module):
    """Attention with ALiBi, ``(b, s, h)`` -> the same."""

    bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        positions = torch.arange(config.seq_length)
        distance = (positions.unsqueeze(0) - positions.unsqueeze(1)).float()  # (s, s), key - query
        future = distance > 0
        slopes = alibi_slopes(config.num_heads).to(distance.device).view(-1, 1, 1)
        bias = (slopes * distance).masked_fill(future, -math.inf)  # (n, s, s)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        fused = self.query_key_value(x).view(batch, seq, self.num_heads, 3, -1)  # (b, s, n, 3, d)
        query, key, value = (part.transpose(1, 2) for part in fused.unbind(dim=3))  # (b, n, s, d)
        bias = self.bias.to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        y: Tensor = self.dense(out.transpose(1, 2).reshape(batch, seq, -1))
        return y
