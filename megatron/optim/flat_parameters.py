"""Parameters in flat buffers: whole on every data rank, or with the optimizer's part shared out.

    computation   weights                      main parameters
    fp32, fp64    one buffer                   the same buffer
    bf16, fp16    one buffer of that dtype     fp32, kept apart

All gradients are views of one more buffer, in the precision of the main parameters. The parallel
layers add to it in place; autograd adds the others, or, in low precision, a hook adds each as soon
as it is there and drops it. Then one collective reduces everything. With ZeRO stage 1 (Rajbhandari
et al. 2020) that is a reduce-scatter: each data rank gets an equal stretch of the buffer, updates
that stretch of the main parameters, and all gather the weights. In a step of several microbatches
this moves as much as an all-reduce, and no more than ZeRO 0.

    buffer         [ parameter a      | parameter b | parameter c                  | padding ]
    data ranks     [ rank 0                         | rank 1                                 ]
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.optim.parameters import Fill, Parameters
from mpu import (
    Box,
    ParallelGroups,
    ShardedTensor,
    ShardSpec,
    replace_parameters,
    set_main_grad,
    set_shard_spec,
    shard_spec,
)
from mpu.collectives import all_gather_in_place, reduce_scatter

_ALIGNMENT = 64
"""Elements. Kernels read fastest from addresses of a power of two."""

_LARGEST = 2**30
"""Elements of one main parameter; kernels of some optimizers count in 32 bits."""


@dataclass(frozen=True)
class _Entry:
    """A parameter of the model and its place in the buffers."""

    name: str
    spec: ShardSpec
    shape: torch.Size
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel()

    @property
    def decays(self) -> bool:
        return len(self.shape) > 1


@dataclass(frozen=True)
class _Main:
    """A main parameter, the stretch of the buffer from ``start`` on."""

    parameter: nn.Parameter
    start: int
    decays: bool

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()


class FlatParameters(Parameters):
    """See ``Parameters``.

    Args:
        models: the stages of this rank, on any device; their parameters move to ``device``.
        shard: cut main parameters over the data ranks.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        groups: ParallelGroups,
        device: torch.device,
        *,
        shard: bool = False,
    ) -> None:
        super().__init__(groups)
        models = list(models)
        self._shard = shard and groups.data.size() > 1
        self._entries, end = _lay_out(models)
        dtype = next(models[0].parameters()).dtype
        main_dtype = torch.promote_types(dtype, torch.float32)
        shards = groups.data.size() if self._shard else 1
        part = shard_length(end, shards)
        self._first = groups.data.rank() * part if self._shard else 0
        self._stop = self._first + part
        self._weights = torch.zeros(part * shards, dtype=dtype, device=device)
        self._gradients = torch.zeros(part * shards, dtype=main_dtype, device=device)
        self._own_weights = self._weights[self._first : self._stop]
        self._main = self._own_weights
        if dtype != main_dtype:
            self._main = torch.zeros(part, dtype=main_dtype, device=device)
        self._place(models)
        self._mains = list(self._cut_main())

    def initialise(self, fill: Fill) -> None:
        for entry in self._entries:
            whole = nn.Parameter(
                torch.empty(entry.shape, dtype=self._main.dtype, device=self._device)
            )
            set_shard_spec(whole, entry.spec)
            fill(entry.name, whole)
            flat = whole.detach().view(-1)
            self._weights[entry.start : entry.stop].copy_(flat)
            first, stop = self._own(entry)
            self._main[first - self._first : stop - self._first].copy_(
                flat[first - entry.start : stop - entry.start]
            )

    def main(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        decayed = [main.parameter for main in self._mains if main.decays]
        return decayed, [main.parameter for main in self._mains if not main.decays]

    def state(self, kind: str, of: Callable[[nn.Parameter], Tensor]) -> Iterator[ShardedTensor]:
        tensor = self._groups.tensor
        for entry in self._entries:
            boxes: list[Box] = []
            for main in self._mains:
                first, stop = max(entry.start, main.start), min(entry.stop, main.stop)
                if first < stop:
                    flat = of(main.parameter).detach()[first - main.start : stop - main.start]
                    boxes += entry.spec.flat_boxes(
                        first - entry.start, flat, tensor.rank(), tensor.size()
                    )
            yield entry.spec.sharded_tensor(
                kind, entry.name, boxes, self._groups, cut_over_data=self._cut_over_data
            )

    def zero_gradients(self) -> None:
        self._gradients.zero_()

    def reduce_gradients(self) -> None:
        groups = self._groups
        for entries, group in (
            ([e for e in self._entries if e.spec.sum_gradient], groups.tensor),
            ([e for e in self._entries if e.spec.tied], groups.embedding),
        ):
            if entries and group.size() > 1:
                # Neighbours in the buffer, and nothing but them and zeros.
                dist.all_reduce(self._gradients[entries[0].start : entries[-1].stop], group=group)
        if self._shard:
            own = reduce_scatter(self._gradients, groups.data, 0)
            self._gradients[self._first : self._stop].copy_(own)
        elif groups.data.size() > 1:
            dist.all_reduce(self._gradients, group=groups.data)

    @torch.no_grad()
    def sync_weights(self) -> None:
        if self._main is not self._own_weights:
            self._own_weights.copy_(self._main)
        if self._shard:
            all_gather_in_place(self._weights, self._groups.data)

    def _counted(self) -> list[Tensor]:
        own = (
            self._own(entry) for entry in self._entries if entry.spec.is_main_replica(self._groups)
        )
        return [self._gradients[first:stop] for first, stop in own if first < stop]

    @property
    def _device(self) -> torch.device:
        return self._gradients.device

    @property
    def _cut_over_data(self) -> bool:
        return self._shard

    def _own(self, entry: _Entry) -> tuple[int, int]:
        """What of ``entry`` lies in the main parameters of this rank; nothing if stop <= first."""
        first = max(entry.start, self._first)
        return first, max(first, min(entry.stop, self._stop))

    def _place(self, models: Iterable[nn.Module]) -> None:
        """Make the parameters of ``models`` views of the buffers."""
        places = {entry.name: slice(entry.start, entry.stop) for entry in self._entries}
        for model in models:
            replace_parameters(model, lambda name, old: self._weights[places[name]].view_as(old))
            for name, parameter in model.named_parameters():
                gradient = self._gradients[places[name]].view_as(parameter)
                set_main_grad(parameter, gradient)
                if parameter.dtype == gradient.dtype:
                    parameter.grad = gradient
                else:
                    parameter.register_post_accumulate_grad_hook(_Adder(gradient))

    def _cut_main(self) -> Iterator[_Main]:
        """Main parameters: the own stretch, cut where weight decay begins or ends."""
        first_without = next((e.start for e in self._entries if not e.decays), self._stop)
        ends = sorted({min(max(first_without, self._first), self._stop), self._stop})
        start = self._first
        for end in ends:
            for first in range(start, end, _LARGEST):
                stop = min(first + _LARGEST, end)
                main = nn.Parameter(self._main[first - self._first : stop - self._first])
                main.grad = self._gradients[first:stop]
                yield _Main(main, first, decays=first < first_without)
            start = end


def _lay_out(models: Iterable[nn.Module]) -> tuple[list[_Entry], int]:
    """A place for every parameter, and the end of the last."""
    found = [item for model in models for item in model.named_parameters()]

    def order(item: tuple[str, nn.Parameter]) -> tuple[bool, bool, bool]:
        """What is treated alike stands together: first what decays, with it what others sum up."""
        spec = shard_spec(item[1])
        decays = item[1].dim() > 1
        # Sums over tensor ranks stand where the two parts meet.
        return not decays, spec.sum_gradient == decays, spec.tied

    entries, start = [], 0
    for name, parameter in sorted(found, key=order):
        entries.append(_Entry(name, shard_spec(parameter), parameter.shape, start))
        start = round_up(entries[-1].stop)
    return entries, start


def round_up(length: int) -> int:
    """Elements from the place of a parameter of that many to where the next may begin."""
    return _multiple(length, _ALIGNMENT)


def shard_length(length: int, shards: int) -> int:
    """Elements of each of ``shards`` equal parts of a buffer that ``length`` have to fit in."""
    return _multiple(length, shards * _ALIGNMENT) // shards


def _multiple(value: int, unit: int) -> int:
    return -(-value // unit) * unit


class _Adder:
    """Hook that moves a gradient of the model into the buffer."""

    def __init__(self, total: Tensor) -> None:
        self.total = total

    def __call__(self, parameter: Tensor) -> None:
        # There is none where a layer has added it to the buffer itself.
        if parameter.grad is not None:
            self.total.add_(parameter.grad)
            parameter.grad = None
