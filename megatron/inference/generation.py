"""Continue a text: one token after the other, each from the logits of the last.

Keys and values of the tokens so far are kept, so that each step computes one token only. Every
tensor rank holds the same logits and draws from a generator in the same state: all of them choose
the same token without telling one another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.errors import ConfigError
from megatron.model.language_model import BloomForPretraining
from megatron.model.transformer import KeyValueCache
from mpu import gather_from_region


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        greedy: take the most probable token; nothing is drawn.
        temperature: divides the logits; below 1 favours probable tokens.
        top_k: draw from so many most probable tokens; None is from all.
        top_p: draw from the fewest tokens that have this probability together.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be greater than 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token, of its logits ``(vocab,)``; ``generator`` is one of the CPU."""
        if self.greedy:
            return int(logits.argmax())
        scaled, tokens = (logits.float().cpu() / self.temperature).sort(descending=True)
        probabilities = scaled[: self.top_k].softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        # The most probable token has nothing before it, and always stays.
        kept = probabilities.masked_fill(before >= self.top_p, 0)
        return int(tokens[torch.multinomial(kept, 1, generator=generator)])


@torch.no_grad()
def generate(
    model: BloomForPretraining,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    eod_id: int | None = None,
) -> Iterator[int]:
    """The tokens that follow ``prompt``, up to and including ``eod_id``.

    Collective over the tensor group: every rank runs through the same iteration. The model must
    have been built without sequence parallelism.

    Raises:
        ConfigError: if the model has learned positions, and fewer than are asked for.
    """
    config = model.config
    capacity = len(prompt) + max_new_tokens
    if config.position_embedding == "learned" and capacity > config.seq_length:
        raise ConfigError(
            f"max_new_tokens ({max_new_tokens}) after a prompt of {len(prompt)} tokens exceeds "
            f"the {config.seq_length} positions that the model has learned"
        )
    generator = torch.Generator().manual_seed(seed)
    caches = model.new_caches(capacity)
    new = list(prompt)
    for _ in range(max_new_tokens):
        token = sampling.choose(_next_logits(model, new, caches), generator)
        yield token
        if token == eod_id:
            return
        new = [token]


def _next_logits(
    model: BloomForPretraining, new: Sequence[int], caches: Sequence[KeyValueCache]
) -> Tensor:
    """Logits ``(vocab,)`` after the tokens in ``caches`` and ``new`` ones.

    The head is given the last position only: a whole prompt's logits may not fit in memory.
    """
    tokens = torch.tensor([new], device=model.head_weight.device)
    last = model.language_model(tokens, caches=caches)[0, -1]
    logits = gather_from_region(F.linear(last, model.head_weight), model.placement.group)
    return logits[: model.config.vocab_size]
