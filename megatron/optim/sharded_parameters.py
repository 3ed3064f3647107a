"""Parameters cut over the data ranks by FSDP (torch's ``fully_shard``), for ZeRO stages 2 and 3.

Each layer is a unit, and so is what is left of a stage. FSDP cuts every parameter into rows, one
part for each data rank, gathers a unit's weights in the precision of the computation before it is
used, and reduces its gradients in that of the main parameters after each backward pass. Stage 3
drops the weights of a layer after its forward pass and gathers them once more for the backward;
stage 2 keeps them until then.

    rows of a weight    [ 0 1 2 | 3 4 5 | 6 7 ]    over 3 data ranks
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatron.optim.parameters import Fill, Parameters
from mpu import Box, ParallelGroups, ShardedTensor, ShardSpec, set_shard_spec, shard_spec


@dataclass(frozen=True)
class _Entry:
    """A parameter of the model and this rank's rows of it.

    Attributes:
        model: as FSDP keeps it.
        main: the rows from ``first_row`` on, of the same storage.
    """

    name: str
    spec: ShardSpec
    model: nn.Parameter
    main: nn.Parameter
    first_row: int

    @property
    def start(self) -> int:
        """First element of the rows in the flattened tensor."""
        return self.first_row * prod(self.model.shape[1:])


class ShardedParameters(Parameters):
    """See ``Parameters``.

    Args:
        models: the stages of this rank, on the meta device.
        units: parts of them that are gathered together; what is left of a model is one more.
        compute_dtype: of the gathered weights.
        reshard: drop gathered weights after the forward pass (stage 3).
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        units: Iterable[nn.Module],
        groups: ParallelGroups,
        device: torch.device,
        *,
        compute_dtype: torch.dtype,
        reshard: bool,
    ) -> None:
        super().__init__(groups)
        models = list(models)
        specs = {n: shard_spec(p) for model in models for n, p in model.named_parameters()}
        # There is no mesh of meta tensors, and none is needed as long as they only stand there.
        mesh_type = "cpu" if device.type == "meta" else device.type
        mesh = DeviceMesh.from_group(groups.data, mesh_type)
        main_dtype = torch.promote_types(compute_dtype, torch.float32)
        policy = MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=main_dtype, cast_forward_inputs=False
        )
        for model in models:
            model.to(main_dtype)
        for module in (*units, *models):
            unit = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
            # A sum, as the other keeper has it: FSDP's mean would round once more.
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)
        for model in models:
            model.to_empty(device=device)
        self._entries = [
            _entry(name, specs[name], parameter, groups.data.rank(), groups.data.size())
            for model in models
            for name, parameter in model.named_parameters()
        ]
        self._main_device = device

    def initialise(self, fill: Fill) -> None:
        for entry in self._entries:
            whole = nn.Parameter(
                torch.empty(entry.model.shape, dtype=entry.main.dtype, device=self._device)
            )
            set_shard_spec(whole, entry.spec)
            fill(entry.name, whole)
            rows = slice(entry.first_row, entry.first_row + entry.main.size(0))
            entry.main.detach().copy_(whole.detach()[rows])

    def main(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        held = [entry for entry in self._entries if entry.main.numel() > 0]
        decayed = [entry.main for entry in held if entry.model.dim() > 1]
        return decayed, [entry.main for entry in held if entry.model.dim() == 1]

    def state(self, kind: str, of: Callable[[nn.Parameter], Tensor]) -> Iterator[ShardedTensor]:
        tensor = self._groups.tensor
        for entry in self._entries:
            boxes: Iterable[Box] = ()
            if entry.main.numel() > 0:
                flat = of(entry.main).detach().view(-1)
                boxes = entry.spec.flat_boxes(entry.start, flat, tensor.rank(), tensor.size())
            yield entry.spec.sharded_tensor(
                kind, entry.name, boxes, self._groups, cut_over_data=self._cut_over_data
            )

    def zero_gradients(self) -> None:
        for entry in self._entries:
            entry.model.grad = None

    def reduce_gradients(self) -> None:
        """FSDP has summed over the data ranks already."""
        for entry in self._entries:
            entry.main.grad = _local_gradient(entry)
        for entries, group in (
            ([e for e in self._entries if e.spec.sum_gradient], self._groups.tensor),
            ([e for e in self._entries if e.spec.tied], self._groups.embedding),
        ):
            gradients = [e.main.grad for e in entries if e.main.grad is not None]
            if gradients and group.size() > 1:
                _sum_together(gradients, group)

    def sync_weights(self) -> None:
        """Nothing to do: FSDP gathers what the main parameters are."""

    def _counted(self) -> list[Tensor]:
        return [
            entry.main.grad
            for entry in self._entries
            if entry.main.grad is not None
            and entry.main.numel() > 0
            and entry.spec.is_main_replica(self._groups)
        ]

    @property
    def _device(self) -> torch.device:
        return self._main_device

    @property
    def _cut_over_data(self) -> bool:
        return True


def _entry(name: str, spec: ShardSpec, parameter: nn.Parameter, rank: int, size: int) -> _Entry:
    assert isinstance(parameter, DTensor)
    rows = parameter.size(0)
    # As torch.chunk cuts: equal parts, and what is left at the end.
    first = min(rank * -(-rows // size), rows)
    return _Entry(name, spec, parameter, nn.Parameter(parameter.to_local().detach()), first)


def _local_gradient(entry: _Entry) -> Tensor:
    """The reduced gradient of this rank's rows; zeros for what the loss does not depend on."""
    gradient = entry.model.grad
    if gradient is None:
        return torch.zeros_like(entry.main)
    assert isinstance(gradient, DTensor)
    local: Tensor = gradient.to_local()
    return local


def _sum_together(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum every tensor over ``group``, all in one collective."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, total in zip(tensors, flat.split(sizes), strict=True):
        tensor.copy_(total.view_as(tensor))
