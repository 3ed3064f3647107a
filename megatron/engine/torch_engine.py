"""The engine on plain torch: tensor x sequence x pipeline x data parallel, ZeRO 0 to 3."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config import Backend, Config
from megatron.engine.base import Engine, Read, StepResult, non_finite_error
from megatron.engine.pipeline import Pipeline
from megatron.model.init import build_model, init_parameter
from megatron.model.inputs import ModelInputs
from megatron.model.language_model import BloomForPretraining
from megatron.model.placement import Placement, build_placement
from megatron.model.stages import build_stages
from megatron.optim.adamw import MOMENTS, build_adamw, moment, set_step, update
from megatron.optim.flat_parameters import FlatParameters
from megatron.optim.loss_scaler import LossScaler
from megatron.optim.parameters import Parameters
from mpu import ParallelGroups, RngStreams, ShardedTensor
from mpu.deferral import DeferringProducts


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
        self._config = config
        self._groups = groups
        self._device = device
        placement = build_placement(config, groups.tensor, device)
        deferral = None
        if config.parallel.schedule == "zero_bubble":
            deferral = DeferringProducts(placement.products)
            placement = replace(placement, products=deferral)
        self.models = _build_models(config, placement, groups, backend)
        self._parameters = _build_parameters(config, self.models, groups, device)
        self._parameters.initialise(
            lambda name, parameter: init_parameter(
                name, parameter, config.model, placement, seed=config.train.seed
            )
        )
        self._optimizer = build_adamw(self._parameters, config.optimizer)
        self._pipeline = Pipeline(self.models, groups.pipeline, config.parallel, deferral)
        self._scaler: LossScaler | None = None
        if config.train.dtype == "fp16":
            self._scaler = LossScaler(config.train.loss_scale)
        self._updates = 0

    @property
    def device(self) -> torch.device:
        return self._device

    def train_step(self, microbatches: Iterable[ModelInputs], lr: float) -> StepResult:
        self._parameters.zero_gradients()
        scale = 1.0 if self._scaler is None else self._scaler.scale
        loss_sum, weight_sum, num_tokens = self._forward_backward(list(microbatches), scale)
        self._parameters.reduce_gradients()
        to_mean = 1 / weight_sum.clamp(min=1 / num_tokens)
        unscale = to_mean / scale
        grad_norm = self._parameters.gradient_norm() * unscale
        measured = torch.stack([loss_sum * unscale, grad_norm])
        self._parameters.scale_gradients(unscale * self._clip_factor(grad_norm))
        # The device skips an update by itself, where one of these is not finite.
        skip = (~measured.isfinite().all()).float()
        update(self._optimizer, lr, skip)
        self._parameters.sync_weights()
        # The one point of a step where the CPU waits for the device.
        result = StepResult(*measured.tolist())
        return self._checked(result)

    def trial(self, microbatches: Iterable[ModelInputs]) -> None:
        self._parameters.zero_gradients()
        self._forward_backward(list(microbatches), scale=1.0)
        self._parameters.zero_gradients()

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[ModelInputs]) -> float:
        batches = list(microbatches)
        loss = self._pipeline.evaluate(batches)
        loss_sum, weight_sum = self._sum_over_run(loss, batches)
        return float(loss_sum / weight_sum.clamp(min=1))

    def state(self) -> list[ShardedTensor]:
        return [
            tensor
            for kind in ("weight", *MOMENTS)
            for tensor in self._parameters.state(kind, self._state_of(kind))
        ]

    def scalars(self) -> dict[str, float]:
        scaler = {} if self._scaler is None else self._scaler.state()
        return {"updates": self._updates, **scaler}

    def load_state(self, read: Read, scalars: Mapping[str, float]) -> None:
        read(self.state())
        self._parameters.sync_weights()
        self._updates = int(scalars["updates"])
        set_step(self._optimizer, self._updates)
        # A save of another precision has no scale: then the initial one is as good as any.
        if self._scaler is not None and "loss_scale" in scalars:
            self._scaler.load(scalars)

    def _forward_backward(
        self, microbatches: list[ModelInputs], scale: float
    ) -> tuple[Tensor, Tensor, int]:
        """Sums over the run of losses and of weights, both in parts of ``num_tokens``."""
        # The sum of a microbatch is divided by its size, to be of the order of a mean; the factor
        # that makes it the mean over all that counts is known at the end only.
        num_tokens = microbatches[0].tokens.numel()
        scaled = [
            replace(inputs, loss_weights=inputs.loss_weights * (scale / num_tokens))
            for inputs in microbatches
        ]
        seed = self._config.train.seed
        loss = self._pipeline.train(scaled, lambda inputs: RngStreams(seed, inputs.samples))
        loss_sum, weight_sum = self._sum_over_run(loss, scaled)
        return loss_sum, weight_sum / scale, num_tokens

    def _sum_over_run(
        self, loss: Tensor | None, microbatches: Iterable[ModelInputs]
    ) -> tuple[Tensor, Tensor]:
        """Sums of losses and of the tokens' weights, over all microbatches of all ranks."""
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        # Every stage has the weights; they count where the loss does.
        if loss is not None:
            weights = [inputs.loss_weights.sum(dtype=torch.float64) for inputs in microbatches]
            totals += torch.stack([loss, torch.stack(weights).sum()])
        for group in (self._groups.data, self._groups.pipeline):
            if group.size() > 1:
                dist.all_reduce(totals, group=group)
        return totals[0], totals[1]

    def _clip_factor(self, grad_norm: Tensor) -> Tensor:
        """What brings a gradient of this norm down to the greatest norm allowed."""
        max_norm = self._config.optimizer.max_grad_norm
        if max_norm == 0:
            return torch.ones_like(grad_norm)
        return (max_norm / (grad_norm + 1e-6)).clamp(max=1)

    def _checked(self, result: StepResult) -> StepResult:
        """Count an update; let the loss scale follow an overflow, or end the run."""
        finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        self._updates += finite
        can_scale = self._scaler is not None and not self._scaler.is_least
        if not finite and not can_scale:
            raise non_finite_error(result)
        if self._scaler is None:
            return result
        scale = self._scaler.scale
        self._scaler.update(overflow=not finite)
        return replace(
            result, skipped=not finite, loss_scale=scale, skipped_steps=self._scaler.skipped
        )

    def _state_of(self, kind: str) -> Callable[[nn.Parameter], Tensor]:
        """What gives the tensor of that kind for a main parameter."""
        if kind == "weight":
            return lambda parameter: parameter
        return lambda parameter: moment(self._optimizer, parameter, kind)


def _build_models(
    config: Config, placement: Placement, groups: ParallelGroups, backend: Backend
) -> list[BloomForPretraining]:
    """The stages of this rank, on the meta device."""
    stages = build_stages(config.model, config.parallel)
    return [
        build_model(
            config.model,
            placement,
            device=torch.device("meta"),
            backend=backend,
            recompute=config.train.recompute,
            stage=stage,
        )
        for stage in stages[groups.pipeline.rank() :: groups.pipeline.size()]
    ]


def _build_parameters(
    config: Config, models: list[BloomForPretraining], groups: ParallelGroups, device: torch.device
) -> Parameters:
    zero = config.parallel.zero
    if zero < 2:
        return FlatParameters(models, groups, device, shard=zero == 1)
    # FSDP takes half a second to import.
    from megatron.optim.sharded_parameters import ShardedParameters

    return ShardedParameters(
        models,
        [layer for model in models for layer in model.language_model.transformer.layers.values()],
        groups,
        device,
        compute_dtype=config.train.torch_dtype,
        reshard=zero == 3,
    )
