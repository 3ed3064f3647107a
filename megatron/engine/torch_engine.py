"""The engine on plain torch: data x tensor parallel, weights whole on every data rank."""

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config import Backend, Config
from megatron.engine.base import Engine, NamedState, StepResult
from megatron.errors import NonFiniteError
from megatron.model.init import build_model, init_parameters
from megatron.model.inputs import ModelInputs
from megatron.model.placement import Placement
from megatron.optim.adamw import MOMENTS, build_adamw, moment, set_step, update
from megatron.optim.main_parameters import MainParameters
from mpu import ParallelGroups, RngStreams


class TorchEngine(Engine):
    """See ``Engine``.

    Args:
        config: of the run.
        groups: of this rank.
        device: where the model lives.
        backend: how attention is computed.
    """

    def __init__(
        self, config: Config, groups: ParallelGroups, device: torch.device, backend: Backend
    ) -> None:
        self._groups = groups
        self._device = device
        self._seed = config.train.seed
        self._max_grad_norm = config.optimizer.max_grad_norm
        placement = Placement(groups.tensor, config.parallel.sequence, config.train.torch_dtype)
        self.model = build_model(
            config.model,
            placement,
            device=device,
            backend=backend,
            recompute=config.train.recompute,
        )
        self._parameters = MainParameters(self.model)
        init_parameters(self._parameters.named(), config.model, placement, seed=config.train.seed)
        self._parameters.copy_to_model()
        self._optimizer = build_adamw(self._parameters, config.optimizer)

    def train_step(self, microbatches: Iterable[ModelInputs], lr: float) -> StepResult:
        self._parameters.zero_gradients()
        totals = self._new_totals()
        num_tokens = 1
        for inputs in microbatches:
            # The sum of a microbatch is divided by its size, to be of the order of a mean; the
            # factor that makes it the mean over all that counts is known at the end only.
            num_tokens = inputs.tokens.numel()
            scaled = replace(inputs, loss_weights=inputs.loss_weights / num_tokens)
            loss = self.model(scaled, RngStreams(self._seed, inputs.samples))
            loss.backward()
            totals += torch.stack([loss.detach().double(), scaled.loss_weights.sum().double()])
        self._parameters.reduce_gradients(self._groups.data, self._groups.tensor)
        loss_sum, weight_sum = self._sum_over_data(totals)
        to_mean = 1 / weight_sum.clamp(min=1 / num_tokens)
        grad_norm = self._parameters.gradient_norm(self._groups.tensor) * to_mean
        measured = torch.stack([loss_sum * to_mean, grad_norm])
        self._update(to_mean * self._clip_factor(grad_norm), measured, lr)
        # The one point of a step where the CPU waits for the device.
        result = StepResult(*measured.tolist())
        _check_finite(result)
        return result

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[ModelInputs]) -> float:
        totals = self._new_totals()
        for inputs in microbatches:
            loss = self.model(inputs)
            totals += torch.stack([loss.double(), inputs.loss_weights.sum().double()])
        loss_sum, weight_sum = self._sum_over_data(totals)
        return float(loss_sum / weight_sum.clamp(min=1))

    def named_state(self) -> list[NamedState]:
        state = []
        for entry in self._parameters:
            tensors = {"weight": entry.main.detach()}
            for name in MOMENTS:
                tensors[name] = moment(self._optimizer, entry.main, name)
            state += [NamedState(entry.name, kind, entry.spec, t) for kind, t in tensors.items()]
        return state

    def state_loaded(self, step: int) -> None:
        self._parameters.copy_to_model()
        set_step(self._optimizer, step)

    def _new_totals(self) -> Tensor:
        """Sums of the losses and of the tokens' weights."""
        return torch.zeros(2, dtype=torch.float64, device=self._device)

    def _sum_over_data(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        if self._groups.data.size() > 1:
            dist.all_reduce(totals, group=self._groups.data)
        return totals[0], totals[1]

    def _clip_factor(self, grad_norm: Tensor) -> Tensor:
        """What brings a gradient of this norm down to the greatest norm allowed."""
        if self._max_grad_norm == 0:
            return torch.ones_like(grad_norm)
        return (self._max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)

    def _update(self, gradient_factor: Tensor, measured: Tensor, lr: float) -> None:
        """Update the weights, unless one of ``measured`` is not finite."""
        self._parameters.scale_gradients(gradient_factor)
        skip = (~measured.isfinite().all()).float()
        update(self._optimizer, lr, skip)
        self._parameters.copy_to_model()


def _check_finite(result: StepResult) -> None:
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        raise NonFiniteError(
            f"loss {result.loss} and gradient norm {result.grad_norm} must be finite; "
            "the weights are as before this step",
            on_every_rank=True,
        )
