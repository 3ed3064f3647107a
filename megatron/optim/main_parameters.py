"""Main parameters: what the optimizer updates, and the buffer that their gradients add up in.

    computation   parameters of the model     main parameters           gradients
    fp32, fp64    updated themselves          the same objects          of that dtype
    bf16          bf16 copies                 fp32, kept apart          fp32

All gradients are views of one flat buffer. The parallel layers add to it in place; autograd adds
the others, or, where the computation is in bf16, a hook adds each as soon as it is there and drops
it. Then one collective reduces everything.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mpu import ShardSpec, set_main_grad, set_shard_spec, shard_spec


@dataclass(frozen=True)
class MainParameter:
    """A parameter of the model under its name, and the tensor that the optimizer updates."""

    name: str
    model: nn.Parameter
    main: nn.Parameter

    @property
    def spec(self) -> ShardSpec:
        return shard_spec(self.main)


class MainParameters:
    """The main parameters of a model and their gradients.

    Args:
        model: its parameters may be uninitialised; ``copy_to_model`` gives them their values.
    """

    def __init__(self, model: nn.Module) -> None:
        found = [MainParameter(name, p, _main_of(p)) for name, p in model.named_parameters()]
        # Those whose gradients the tensor ranks have to sum come first: one run of the buffer.
        self._entries = sorted(found, key=lambda entry: not entry.spec.sum_gradient)
        sizes = [entry.main.numel() for entry in self._entries]
        first = self._entries[0].main
        self._buffer = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        num_summed = sum(entry.spec.sum_gradient for entry in self._entries)
        self._to_sum = self._buffer[: sum(sizes[:num_summed])]
        for entry, view in zip(self._entries, self._buffer.split(sizes), strict=True):
            entry.main.grad = view.view_as(entry.main)
            set_main_grad(entry.model, entry.main.grad)
            if entry.main is not entry.model:
                entry.model.register_post_accumulate_grad_hook(_Adder(entry.main.grad))

    def __iter__(self) -> Iterator[MainParameter]:
        return iter(self._entries)

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and main parameters."""
        return ((entry.name, entry.main) for entry in self._entries)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the main parameters to those of the model, where they are not the same."""
        apart = [entry for entry in self._entries if entry.main is not entry.model]
        if apart:
            torch._foreach_copy_([e.model for e in apart], [e.main for e in apart])

    def zero_gradients(self) -> None:
        self._buffer.zero_()

    def reduce_gradients(self, data: ProcessGroup, tensor: ProcessGroup) -> None:
        """Sum over the data ranks, and over the tensor ranks what they hold parts of."""
        if tensor.size() > 1 and self._to_sum.numel() > 0:
            dist.all_reduce(self._to_sum, group=tensor)
        if data.size() > 1:
            dist.all_reduce(self._buffer, group=data)

    def scale_gradients(self, factor: Tensor) -> None:
        self._buffer.mul_(factor)

    def gradient_norm(self, tensor: ProcessGroup) -> Tensor:
        """L2 norm of the gradient of the whole model, a float64 scalar, the same on all ranks.

        Each logical parameter counts once: a replicated one on the first tensor rank.
        """
        counted = [
            entry.main.grad
            for entry in self._entries
            if entry.main.grad is not None
            and not entry.spec.tied_copy
            and (entry.spec.dim is not None or tensor.rank() == 0)
        ]
        square = torch.zeros((), dtype=torch.float64, device=self._buffer.device)
        for norm in torch._foreach_norm(counted):
            square += norm.double().square()
        if tensor.size() > 1:
            dist.all_reduce(square, group=tensor)
        return square.sqrt()


def _main_of(parameter: nn.Parameter) -> nn.Parameter:
    """``parameter`` itself, or an uninitialised float32 twin of one of low precision."""
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    main = nn.Parameter(torch.empty_like(parameter, dtype=torch.float32))
    set_shard_spec(main, shard_spec(parameter))
    return main


class _Adder:
    """Hook that moves a gradient of the model into the buffer."""

    def __init__(self, total: Tensor) -> None:
        self.total = total

    def __call__(self, parameter: Tensor) -> None:
        # There is none where a layer has added it to the buffer itself.
        if parameter.grad is not None:
            self.total.add_(parameter.grad)
            parameter.grad = None
