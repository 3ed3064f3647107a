"""A training step of Megatron-Core's GPT, where that package is installed.

It is another model than BLOOM, and does less: it has no ALiBi, and no layer norm after the
embedding. Everything else has the same shape: local layers, tied embeddings, no dropout.

It is written for GPUs. On a CPU it runs with two patches: ``torch.cuda.current_device``, on which
it allocates its buffers, names the CPU; and the tracker of CUDA's random numbers, which it enters
around a dropout of probability zero, does nothing.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn

from megatron.benchmarks.measure import check_losses
from megatron.config import ModelConfig

NAME = "Megatron-Core"

_TOLERANCE = 0.02
"""Relative difference of the first loss from ln V, that of a guess."""


def is_installed() -> bool:
    """Whether ``megatron.core`` can be imported."""
    return find_spec("megatron.core") is not None


class CoreGpt(nn.Module):
    """Megatron-Core's GPT with the loss of the other contenders, with weights of its own.

    Needs a process group, and builds its model on ``device``.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        self._device = device
        with _runs_on(device):
            self.gpt = _build_gpt(config, device)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean loss of the predictions of ``(b, s)`` tokens, a scalar."""
        seq = tokens.size(1)
        positions = torch.arange(seq, device=tokens.device).expand_as(tokens)
        # The mask that it would make of itself, on CUDA only.
        hidden = None if tokens.is_cuda else torch.ones(1, 1, seq, seq, dtype=torch.bool).triu(1)
        with _runs_on(self._device):
            losses: Tensor = self.gpt(tokens, positions, hidden, labels=tokens.roll(-1, dims=1))
        return losses[:, :-1].mean()


def check_first_loss(loss: float, config: ModelConfig) -> None:
    """Refuse a loss that is not that of a model which knows nothing yet.

    Raises:
        RunError: if it is far from ln V.
    """
    check_losses({NAME: loss}, math.log(config.vocab_size), _TOLERANCE)


def _build_gpt(config: ModelConfig, device: torch.device) -> nn.Module:
    # Optional, and slow to import; it warns of every library that is not there.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer import TransformerConfig

        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel()
        settings = TransformerConfig(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_heads,
            ffn_hidden_size=config.ffn_size,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cpu_initialization=True,
        )
        gpt: nn.Module = GPTModel(
            settings,
            get_gpt_layer_local_spec(),
            vocab_size=config.vocab_size,
            max_sequence_length=config.seq_length,
            share_embeddings_and_output_weights=True,
            position_embedding_type="none",
        )
    return gpt.to(device)


@contextmanager
def _runs_on(device: torch.device) -> Iterator[None]:
    """On a CPU, the two patches."""
    if device.type == "cuda":
        yield
        return
    no_tracker = SimpleNamespace(fork=nullcontext)
    with (
        mock.patch("torch.cuda.current_device", return_value=device),
        mock.patch(
            "megatron.core.transformer.dot_product_attention.tensor_parallel.get_cuda_rng_tracker",
            return_value=no_tracker,
        ),
    ):
        yield
