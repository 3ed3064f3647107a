"""Pipeline stages: which part of the list of layers a model holds.

The model is a list: embedding, transformer layers, final layer norm and head. A stage is a range of
it. Stages follow each other round the ranks of the pipeline; each rank holds ``chunks`` of them:

    2 ranks, 2 chunks     stage  0 1 2 3
                          rank   0 1 0 1
"""

from dataclasses import dataclass
from itertools import accumulate

from megatron.config import ModelConfig, ParallelConfig
from megatron.model.flops import head_flops, layer_flops


@dataclass(frozen=True)
class Stage:
    """A range of the list of layers.

    Attributes:
        layers: indices of its transformer layers.
        first: it begins with the embedding.
        last: it ends with the final layer norm and the head.
    """

    layers: range
    first: bool = True
    last: bool = True


def whole_model(config: ModelConfig) -> Stage:
    """The stage that is the whole model."""
    return Stage(range(config.num_layers))


def build_stages(model: ModelConfig, parallel: ParallelConfig) -> list[Stage]:
    """All stages of the pipeline, the first one first.

    Work is shared out so that the stage with the most has as little as can be. With
    ``parallel.partition`` count, embedding and head count as a layer each, as in BLOOM's own run;
    with cost, the embedding is free, and the head counts as the layers with as many floating-point
    operations.
    """
    count = parallel.num_stages
    embedding, head = 1.0, 1.0
    if parallel.partition == "cost":
        embedding, head = 0.0, head_flops(model) / layer_flops(model)
    sizes = _divide(model.num_layers, count, embedding, head)
    ends = list(accumulate(sizes))
    return [
        Stage(range(end - size, end), first=index == 0, last=index == count - 1)
        for index, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


def _divide(num_layers: int, count: int, embedding: float, head: float) -> list[int]:
    """Layers of each of ``count`` stages, at least one.

    Each layer goes to the stage with the least work, of equal ones to the last: the earlier a
    stage, the more microbatches it holds activations of.
    """
    sizes = [1] * count
    work = [1.0] * count
    work[0] += embedding
    work[-1] += head
    for _ in range(num_layers - count):
        index = min(reversed(range(count)), key=lambda index: work[index])
        sizes[index] += 1
        work[index] += 1
    return sizes
