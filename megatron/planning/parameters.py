"""The parameters of a stage on one rank, counted on a model of one layer.

Layers are alike, so that a stage of one layer, built on the meta device among absent peers, tells
the parameters of a stage of any number. ZeRO 0 and 1 keep all parameters of a rank in one flat
buffer (``megatron/optim/flat_parameters.py``), each at a round address, ordered so that those whose
gradients the tensor ranks sum up are neighbours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import torch
from torch import nn

from megatron.config import Config, ModelConfig, ParallelConfig
from megatron.model.init import build_model
from megatron.model.placement import Placement
from megatron.model.stages import Stage, build_stages
from megatron.optim.flat_parameters import round_up, shard_length
from megatron.planning.absent_peers import absent_peers
from mpu import ParallelDims, shard_spec

META = torch.device("meta")

_UNUSED = ("token_type_embeddings", "pooler")
"""Modules that hold what the loss does not depend on."""


@dataclass(frozen=True)
class Alike:
    """Parameters of one shape, which are treated alike.

    Attributes:
        shape: of each on one rank.
        logical: elements of each on all tensor ranks together, without padding; 0 for the second
            copy of a tied weight.
        sum_gradient: the tensor ranks sum up their gradients.
        tied: first and last stage sum up their gradients.
        used: the loss depends on them.
    """

    shape: tuple[int, ...]
    logical: int
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
        return shard_length(self.length, parts)


@dataclass(frozen=True)
class _OneLayer:
    """Parameters of a stage with one layer.

    Attributes:
        layer: of the layer.
        edge: of what there is besides.
        vocab_rows: of the head, padding included; 0 on a stage without.
    """

    layer: tuple[Alike, ...]
    edge: tuple[Alike, ...]
    vocab_rows: int


def layer_parameters(config: Config, layers: int = 1) -> list[Alike]:
    """The parameters of as many transformer layers."""
    found = _one_layer(config, first=False, last=False).layer
    return [replace(one, count=layers) for one in found]


def edge_parameters(config: Config, stage: Stage) -> list[Alike]:
    """What a stage has besides its layers: nothing between the first and the last."""
    return list(_one_layer(config, first=stage.first, last=stage.last).edge)


def vocab_rows(config: Config) -> int:
    """Rows of a vocabulary on one tensor rank, padding included."""
    return _one_layer(config, first=False, last=True).vocab_rows


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
    length = sum(one.count * round_up(one.size) for one in parameters)
    summed = [one for one in parameters if one.sum_gradient]
    stretch = sum(one.count * round_up(one.size) for one in summed)
    if summed:
        # The stretch ends with the last vector, not where the next parameter begins.
        last = min(one.size for one in summed)
        stretch -= round_up(last) - last
    return FlatBuffer(length, stretch, sum(one.count * one.size for one in parameters if one.tied))


def main_dtype(config: Config) -> torch.dtype:
    """Of gradients and optimizer state."""
    return torch.promote_types(config.train.torch_dtype, torch.float32)


def _one_layer(config: Config, *, first: bool, last: bool) -> _OneLayer:
    # Layer norms of apex have the same parameters, and need a package.
    model = replace(config.model, layernorm="torch")
    return _built(model, config.parallel.tensor, config.parallel.sequence, first, last)


@cache
def _built(model: ModelConfig, tensor: int, sequence: bool, first: bool, last: bool) -> _OneLayer:
    stage = Stage(range(1), first, last)
    with absent_peers(ParallelDims(tensor=tensor)) as groups:
        placement = Placement(groups.tensor, sequence_parallel=sequence)
        built = build_model(model, placement, device=META, backend="explicit", stage=stage)
    layer: list[Alike] = []
    edge: list[Alike] = []
    for name, parameter in built.named_parameters():
        (layer if ".layers." in name else edge).append(_alike(name, parameter))
    return _OneLayer(tuple(layer), tuple(edge), built.head_weight.size(0) if last else 0)


def _alike(name: str, parameter: nn.Parameter) -> Alike:
    spec = shard_spec(parameter)
    return Alike(
        shape=tuple(parameter.shape),
        logical=0 if spec.tied_copy else prod(spec.shape),
        sum_gradient=spec.sum_gradient,
        tied=spec.tied,
        used=not any(module in name.split(".") for module in _UNUSED),
    )
