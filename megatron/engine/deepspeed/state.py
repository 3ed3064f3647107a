"""Where DeepSpeed keeps weights and moments in full precision.

    ZeRO    a parameter's part on this data rank
    0       all of it: the parameter itself
    1, 2    what of it lies in this rank's stretch of a flat buffer; there may be nothing
    3       an equal part for each data rank, the last one padded

A part is a stretch of the flattened parameter, and, where DeepSpeed lets it be seen, a view of what
it trains with. Its functions that gather whole parameters would need, on each data rank, memory for
the state of all of them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.optim import AdamW

from megatron.optim.adamw import MOMENTS, set_step

WEIGHT = "weight"
KINDS = (WEIGHT, *MOMENTS)


@dataclass(frozen=True)
class Part:
    """What this rank holds of the weight or a moment of a parameter.

    Attributes:
        start: its first element in the flattened parameter.
        padded: its elements, and what is there to fill it up.
        size: elements without padding.
    """

    start: int
    padded: Tensor
    size: int

    @property
    def flat(self) -> Tensor:
        return self.padded[: self.size]


class State(ABC):
    """Main weights and moments of this rank.

    Args:
        wrapper: the optimizer that DeepSpeed has made of ``optimizer``.
        optimizer: what it calls with stretches of its own as parameters.
    """

    cut_over_data = True

    def __init__(self, wrapper: Any, optimizer: AdamW) -> None:
        self._wrapper = wrapper
        self._optimizer = optimizer
        self._make_moments()
        self.set_updates(0)

    def set_updates(self, count: int) -> None:
        """Say how many updates the moments hold."""
        set_step(self._optimizer, count)

    @abstractmethod
    def part(self, parameter: nn.Parameter, kind: str) -> Part | None:
        """What this rank holds of the ``kind`` of ``parameter``; None for nothing."""

    @abstractmethod
    def write(self, parameter: nn.Parameter, kind: str, part: Part) -> None:
        """Take over a part that ``part`` has given and that has been written to."""

    @abstractmethod
    def sync_weights(self) -> None:
        """Let the model compute with the main weights as they are now. Collective."""

    def _make_moments(self) -> None:
        """Give what the optimizer updates moments, all zero."""
        for group in self._optimizer.param_groups:
            for main in group["params"]:
                self._add_moments(main)

    def _add_moments(self, main: Tensor) -> None:
        self._optimizer.state[main] = {name: torch.zeros_like(main) for name in MOMENTS}


class WholeState(State):
    """ZeRO 0."""

    cut_over_data = False

    def part(self, parameter: nn.Parameter, kind: str) -> Part:
        held = parameter if kind == WEIGHT else self._optimizer.state[parameter][kind]
        return Part(0, held.detach().view(-1), held.numel())

    def write(self, parameter: nn.Parameter, kind: str, part: Part) -> None:
        """Nothing to do: parts are views."""

    def sync_weights(self) -> None:
        """Nothing to do: the model computes with the main weights."""


class FlatState(State):
    """ZeRO 1 and 2."""

    def __init__(self, wrapper: Any, optimizer: AdamW) -> None:
        super().__init__(wrapper, optimizer)
        # DeepSpeed lets moments be seen from the first step on; a run may be saved before it.
        wrapper._lazy_init_hp_params_optimizer_state()

    def part(self, parameter: nn.Parameter, kind: str) -> Part | None:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        held = mapping.get_hp_fragment(None if kind == WEIGHT else kind)
        return Part(mapping.lp_fragment_address.start, held.detach(), held.numel())

    def write(self, parameter: nn.Parameter, kind: str, part: Part) -> None:
        """Nothing to do: parts are views."""

    def sync_weights(self) -> None:
        self._wrapper.update_lp_params()


class PartitionedState(State):
    """ZeRO 3; what is kept on NVMe is copied to be seen."""

    def part(self, parameter: nn.Parameter, kind: str) -> Part | None:
        if kind == WEIGHT:
            held = safe_get_local_fp32_param(parameter)
        else:
            held = safe_get_local_optimizer_state(parameter, kind)
        if self._wrapper.swap_optimizer:
            # The buffer that it has been read to is used for the next.
            held = held.clone()
        whole: int = parameter.ds_numel  # type: ignore[attr-defined]
        start = held.numel() * self._wrapper._get_param_partition_rank(parameter)
        size = min(held.numel(), whole - start)
        return Part(start, held.detach(), size) if size > 0 else None

    def write(self, parameter: nn.Parameter, kind: str, part: Part) -> None:
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, part.padded)
        else:
            safe_set_local_optimizer_state(parameter, part.padded, kind)

    def sync_weights(self) -> None:
        # Small parameters stay gathered between steps.
        gathered = self._wrapper.persistent_parameters
        if gathered:
            gathered[0].partition(gathered)
        for group in self._wrapper.fp16_groups:
            for parameter in group:
                parameter.ds_tensor.copy_(safe_get_local_fp32_param(parameter))
        if gathered:
            gathered[0].all_gather(gathered)

    def _make_moments(self) -> None:
        wrapper = self._wrapper
        for number, main in enumerate(wrapper.fp32_partitioned_groups_flat):
            if wrapper._swappable_optimizer_subgroup(number):
                wrapper._optimizer_states_and_gradient_swap_in(number)
                self._add_moments(main)
                wrapper._optimizer_states_and_gradient_swap_out(number)
            else:
                self._add_moments(main)


def build_state(wrapper: Any, optimizer: AdamW, zero: int) -> State:
    """The state of a run at that stage of ZeRO."""
    return (WholeState, FlatState, FlatState, PartitionedState)[zero](wrapper, optimizer)
