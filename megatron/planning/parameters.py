"""The parameters of a stage on one rank, counted from the config without building a model.

Of a layer, with hidden size h, MLP width f (twice that on the way in, if gated) and t tensor ranks:

    query_key_value   (3h/t, h)  (3h/t)        dense            (h, h/t)  (h)
    dense_h_to_4h     (f/t, h)   (f/t)         dense_4h_to_h    (h, f/t)  (h)
    two layer norms   4 x (h)

ZeRO 0 and 1 keep all parameters of a rank in one flat buffer, each at a round address, ordered so
that those whose gradients the tensor ranks sum up are neighbours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch

from megatron.config import Config, ModelConfig, ParallelConfig
from megatron.model.stages import Stage, build_stages

_ALIGNMENT = 64
"""Elements between the places that parameters of a flat buffer begin at."""


@dataclass(frozen=True)
class Alike:
    """Parameters of one shape, which are treated alike.

    Attributes:
        shape: of each on one rank.
        sum_gradient: the tensor ranks sum up their gradients.
        tied: first and last stage sum up their gradients.
        used: the loss depends on them.
    """

    shape: tuple[int, ...]
    count: int = 1
    sum_gradient: bool = False
    tied: bool = False
    used: bool = True

    @property
    def size(self) -> int:
        """Elements of each."""
        return prod(self.shape)

    def rows(self, parts: int) -> int:
        """Elements of each that the first of ``parts`` ranks holds, if they are cut into rows."""
        return -(-self.shape[0] // parts) * prod(self.shape[1:])


@dataclass(frozen=True)
class FlatBuffer:
    """Elements of a flat buffer, before what is filled up at its end.

    Attributes:
        summed: length of the stretch whose gradients the tensor ranks sum up.
        tied: length of the word embedding that another stage has too.
    """

    length: int
    summed: int
    tied: int

    def shard(self, parts: int) -> int:
        """Length of each of ``parts`` equal shards."""
        return round_up(self.length, parts * _ALIGNMENT) // parts


def layer_parameters(config: Config, layers: int = 1) -> list[Alike]:
    """The parameters of as many transformer layers."""
    model, t = config.model, config.parallel.tensor
    h, f = model.hidden_size, model.ffn_size
    up = (2 if model.is_gated else 1) * f // t
    shapes = [(3 * h // t, h), (3 * h // t,), (h, h // t), (up, h), (up,), (h, f // t)]
    vectors = Alike((h,), 6 * layers, sum_gradient=config.parallel.sequence)
    return [*(Alike(shape, layers) for shape in shapes), vectors]


def edge_parameters(config: Config, stage: Stage) -> list[Alike]:
    """What a stage has besides its layers: nothing between the first and the last."""
    model, summed = config.model, config.parallel.sequence
    h = model.hidden_size
    found: list[Alike] = []
    tied = model.tie_embeddings and stage.first != stage.last
    tables = int(stage.first) + int(stage.last and (tied or not model.tie_embeddings))
    if tables > 0:
        found.append(Alike((vocab_rows(config), h), tables, tied=tied))
    if stage.first:
        if model.embedding_layernorm:
            found.append(Alike((h,), 2, summed))
        if model.position_embedding == "learned":
            found.append(Alike((model.seq_length, h), 1, summed))
        if model.num_token_types > 0:
            found.append(Alike((model.num_token_types, h), 1, summed, used=False))
    if stage.last:
        found.append(Alike((h,), 2, summed))
        if model.pooler:
            found += [Alike((h, h), used=False), Alike((h,), used=False)]
    return found


def vocab_rows(config: Config) -> int:
    """Rows of a vocabulary on one tensor rank, padding included."""
    rows = -(-config.model.vocab_size // config.parallel.tensor)
    return round_up(rows, config.model.vocab_padding_multiple)


def stages_of(config: Config, pipeline_rank: int) -> list[Stage]:
    """The stages of a rank of the pipeline."""
    return _all_stages(config.model, config.parallel)[pipeline_rank :: config.parallel.pipeline]


@cache
def _all_stages(model: ModelConfig, parallel: ParallelConfig) -> list[Stage]:
    return build_stages(model, parallel)


def parameters_of(config: Config, stages: Iterable[Stage]) -> list[Alike]:
    """All parameters of ``stages``."""
    found: list[Alike] = []
    for stage in stages:
        found += layer_parameters(config, len(stage.layers)) + edge_parameters(config, stage)
    return found


def flat_buffer(parameters: Sequence[Alike]) -> FlatBuffer:
    """The buffer that ``parameters`` lie in."""
    length = sum(one.count * round_up(one.size, _ALIGNMENT) for one in parameters)
    summed = [one for one in parameters if one.sum_gradient]
    stretch = sum(one.count * round_up(one.size, _ALIGNMENT) for one in summed)
    if summed:
        # The stretch ends with the last vector, not where the next parameter begins.
        last = min(one.size for one in summed)
        stretch -= round_up(last, _ALIGNMENT) - last
    return FlatBuffer(length, stretch, sum(one.count * one.size for one in parameters if one.tied))


def main_dtype(config: Config) -> torch.dtype:
    """Of gradients and optimizer state."""
    return torch.promote_types(config.train.torch_dtype, torch.float32)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
