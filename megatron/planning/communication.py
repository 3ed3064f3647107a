"""Bytes that ranks send each other in one training step, collective by collective.

Of one microbatch, with n bytes of hidden states, a stage sends over the tensor ranks

                        forward                          backward
    layer               2 all-reduces n                  2 all-reduces n
    embedding           1 all-reduce n
    head                1 all-gather, 3 numbers a token  1 all-reduce n

With sequence parallelism an all-gather and a reduce-scatter stand for each all-reduce. Full
recomputation repeats the collectives of a layer's forward pass, but without dropout not the last,
whose result nobody needs. Between stages go hidden states (a part of the sequence each, with
sequence parallelism) and their gradients. Once a step, with g bytes of gradients and w of weights,

    tensor       gradients of norms and biases, with sequence parallelism
    embedding    gradient of the word embedding that first and last stage share
    data         ZeRO 0: all-reduce g       1: reduce-scatter g, all-gather w
    data         ZeRO 2 and 3, for each unit and microbatch: all-gathers w, reduce-scatter g
    all          sums of losses and weights (16 bytes), the gradient norm (8 bytes)

ZeRO 3 gathers a unit for each pass. ZeRO 2 keeps what it has gathered until the next backward pass
is through with it, so that the order of the passes decides how often it gathers.

Not counted is the batch, which travels between CPUs. That these are all collectives of a step is
tested, by counting those of live runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from megatron.config import Config
from megatron.engine.schedules import Pass, Task, plan_training
from megatron.model.stages import Stage
from megatron.planning.parameters import Alike, flat_buffer, main_dtype, parameters_of, stages_of
from mpu import ParallelDims

TrafficAxis: TypeAlias = Literal["tensor", "pipeline", "data", "embedding", "model"]
"""Groups of ranks; model is tensor x pipeline, over which the gradient norm is summed up."""

_SCALARS = 16
_NORM = 8


@dataclass(frozen=True)
class Traffic:
    """What one rank hands to collectives, in bytes of the whole tensor of each.

    Attributes:
        reduced: by all-reduces.
        gathered: by all-gathers: what all ranks together give.
        scattered: by reduce-scatters: what each rank gives.
        sent: to one other rank.
    """

    reduced: int = 0
    gathered: int = 0
    scattered: int = 0
    sent: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.reduced + other.reduced,
            self.gathered + other.gathered,
            self.scattered + other.scattered,
            self.sent + other.sent,
        )

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(
            self.reduced * times, self.gathered * times, self.scattered * times, self.sent * times
        )

    @property
    def payload(self) -> int:
        return self.reduced + self.gathered + self.scattered + self.sent

    def on_wire(self, ranks: int) -> float:
        """Bytes that each of ``ranks`` sends, where collectives go around a ring."""
        rounds = 2 * self.reduced + self.gathered + self.scattered
        return self.sent + rounds * (ranks - 1) / ranks


def sent_per_step(config: Config, dims: ParallelDims) -> dict[TrafficAxis, int]:
    """Bytes that the busiest rank of each axis hands to collectives and sends in one step.

    Each call counts with the whole tensor: what an all-reduce or a reduce-scatter takes, and what
    an all-gather gives. The batch is that at the end of a ramp-up.
    """
    return {axis: traffic.payload for axis, traffic in _busiest(config, dims).items()}


def on_wire_per_step(config: Config, dims: ParallelDims) -> dict[TrafficAxis, float]:
    """Bytes that the busiest rank of each axis sends in one step, around rings.

    Of n bytes over r ranks, an all-reduce sends 2 (r - 1) / r n, the others half of that.
    """
    return {
        axis: traffic.on_wire(_ranks(dims, axis))
        for axis, traffic in _busiest(config, dims).items()
    }


def num_microbatches(config: Config, dims: ParallelDims) -> int:
    """Microbatches of each data rank in one step."""
    return config.train.global_batch_size // (config.train.least_micro_batch_size * dims.data)


def stage_traffic(config: Config, stage: Stage) -> Traffic:
    """Over the tensor ranks, for one microbatch through a stage, forward and backward."""
    if config.parallel.tensor == 1:
        return Traffic()
    hidden = _hidden_bytes(config)
    total = layer_traffic(config) * len(stage.layers)
    if stage.first:
        total += _exchange(config, hidden)
    if stage.last:
        tokens = config.train.least_micro_batch_size * config.model.seq_length
        numbers = 3 * config.parallel.tensor * tokens * main_dtype(config).itemsize
        total += _exchange(config, hidden) + Traffic(gathered=numbers)
    return total


def layer_traffic(config: Config) -> Traffic:
    """Over more than one tensor rank, for one microbatch through a layer."""
    hidden = _hidden_bytes(config)
    total = _exchange(config, hidden) * 4
    if config.train.recompute == "full":
        needed = 2 if config.model.hidden_dropout > 0 else 1
        if config.parallel.sequence:
            total += Traffic(gathered=2 * hidden, scattered=needed * hidden)
        else:
            total += Traffic(reduced=needed * hidden)
    return total


def transfer_bytes(config: Config) -> int:
    """Of the hidden states that one stage sends to the next, for one microbatch."""
    parts = config.parallel.tensor if config.parallel.sequence else 1
    return _hidden_bytes(config) // parts


def rank_traffic(
    config: Config, dims: ParallelDims, pipeline_rank: int
) -> dict[TrafficAxis, Traffic]:
    """What a rank of that stage of the pipeline sends in one step along each axis."""
    count = num_microbatches(config, dims)
    stages = stages_of(config, pipeline_rank)
    tensor = Traffic()
    for stage in stages:
        tensor += stage_traffic(config, stage) * count
    transfers = sum((not stage.last) + (not stage.first) for stage in stages) * count
    scalars = Traffic(reduced=_SCALARS)
    once = _once_a_step(config, dims, parameters_of(config, stages))
    found: dict[TrafficAxis, Traffic] = {
        "tensor": tensor + once["tensor"],
        "pipeline": Traffic(sent=transfers * transfer_bytes(config)) + scalars,
        "data": once["data"] + _gathering_traffic(config, dims, pipeline_rank) + scalars,
        "embedding": once["embedding"],
        "model": Traffic(reduced=_NORM),
    }
    return {a: t if _ranks(dims, a) > 1 else Traffic() for a, t in found.items()}


def _busiest(config: Config, dims: ParallelDims) -> dict[TrafficAxis, Traffic]:
    ranks = [rank_traffic(config, dims, rank) for rank in range(dims.pipeline)]
    return {axis: max((rank[axis] for rank in ranks), key=_payload) for axis in ranks[0]}


def _payload(traffic: Traffic) -> int:
    return traffic.payload


def _ranks(dims: ParallelDims, axis: TrafficAxis) -> int:
    return {
        "tensor": dims.tensor,
        "pipeline": dims.pipeline,
        "data": dims.data,
        "embedding": min(dims.pipeline, 2),
        "model": dims.tensor * dims.pipeline,
    }[axis]


def _hidden_bytes(config: Config) -> int:
    tokens = config.train.least_micro_batch_size * config.model.seq_length
    return tokens * config.model.hidden_size * config.train.torch_dtype.itemsize


def _exchange(config: Config, hidden: int) -> Traffic:
    """An all-reduce of the hidden states, or the pair that stands for it."""
    if config.parallel.sequence:
        return Traffic(gathered=hidden, scattered=hidden)
    return Traffic(reduced=hidden)


def _once_a_step(
    config: Config, dims: ParallelDims, parameters: list[Alike]
) -> dict[Literal["tensor", "data", "embedding"], Traffic]:
    """The sums of gradients after the last microbatch, and what follows the update."""
    itemsize, zero = main_dtype(config).itemsize, config.parallel.zero
    if zero >= 2:
        summed = [one for one in parameters if one.sum_gradient]
        tied = [one for one in parameters if one.tied]
        return {
            "tensor": Traffic(reduced=itemsize * _rows(summed, dims.data)),
            "data": Traffic(reduced=_NORM),
            "embedding": Traffic(reduced=itemsize * _rows(tied, dims.data)),
        }
    buffer = flat_buffer(parameters)
    shards = dims.data if zero == 1 else 1
    whole = buffer.shard(shards) * shards
    data = Traffic(reduced=whole * itemsize)
    if zero == 1:
        weights = whole * config.train.torch_dtype.itemsize
        data = Traffic(reduced=_NORM, scattered=whole * itemsize, gathered=weights)
    return {
        "tensor": Traffic(reduced=buffer.summed * itemsize),
        "data": data,
        "embedding": Traffic(reduced=buffer.tied * itemsize),
    }


def _rows(parameters: Iterable[Alike], parts: int) -> int:
    """Elements of ``parameters`` on the first of ``parts`` ranks."""
    return sum(one.count * one.rows(parts) for one in parameters)


def _gathering_traffic(config: Config, dims: ParallelDims, pipeline_rank: int) -> Traffic:
    """Gathered weights and scattered gradients of the microbatches of a step."""
    parallel = config.parallel
    if parallel.zero < 2:
        return Traffic()
    tasks = plan_training(
        parallel.schedule, dims.pipeline, parallel.chunks, num_microbatches(config, dims)
    ).tasks(pipeline_rank)
    total = Traffic()
    for index, stage in enumerate(stages_of(config, pipeline_rank)):
        own = [task for task in tasks if task.stage == pipeline_rank + index * dims.pipeline]
        backwards = sum(task.kind is Pass.BACKWARD for task in own)
        gathers = len(own) if parallel.zero == 3 else _gathers(own)
        parameters = parameters_of(config, [stage])
        weights = dims.data * _rows(parameters, dims.data)
        gradients = dims.data * _rows([one for one in parameters if one.used], dims.data)
        total += Traffic(
            gathered=gathers * weights * config.train.torch_dtype.itemsize,
            scattered=backwards * gradients * main_dtype(config).itemsize,
        )
    return total


def _gathers(tasks: Iterable[Task]) -> int:
    """How often weights are gathered that a backward pass drops and any pass needs."""
    count, held = 0, False
    for task in tasks:
        count += not held
        held = task.kind is not Pass.BACKWARD
    return count
