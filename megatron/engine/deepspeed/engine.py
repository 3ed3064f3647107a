"""The engine on DeepSpeed: ZeRO 0 to 3, offloading, and its pipeline.

DeepSpeed drives forward, backward and the update, of the same model, with the same optimizer and
over the same process groups. How it is built is in ``build.py``, where it keeps the training state
in ``state.py``.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config import Backend, Config
from megatron.engine.base import Engine, Read, StepResult, non_finite_error
from megatron.engine.deepspeed.build import build_optimizer, initialize, prepare_model
from megatron.engine.deepspeed.pipeline import PipelineStage, Streams, no_dropout
from megatron.engine.deepspeed.scale import DeepSpeedLossScaler
from megatron.engine.deepspeed.state import KINDS, WEIGHT, Part, build_state
from megatron.model.init import init_parameter
from megatron.model.inputs import ModelInputs
from megatron.model.placement import Placement, build_placement
from megatron.optim.parameters import square_sum
from mpu import ParallelGroups, RngStreams, ShardedTensor, set_shard_spec, shard_spec


class DeepSpeedEngine(Engine):
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
        model = prepare_model(config, placement, groups, device, backend)
        self._parameters = dict(model.named_parameters())
        self._specs = {name: shard_spec(item) for name, item in self._parameters.items()}
        self._stage = PipelineStage(model, groups) if groups.pipeline.size() > 1 else None
        self._optimizer = build_optimizer(self._parameters.values(), config.optimizer)
        self._optimizer.register_step_pre_hook(lambda *_: self._before_update())
        self._engine: Any = initialize(config, groups, self._stage or model, self._optimizer)
        self._scaler: DeepSpeedLossScaler | None = None
        if config.train.dtype == "fp16":
            self._scaler = DeepSpeedLossScaler(config.train.loss_scale)
            self._engine.optimizer.loss_scaler = self._scaler
        self._state = build_state(self._engine.optimizer, self._optimizer, config.parallel.zero)
        self._initialise(placement)
        self._is_trial = False
        self._own_norm = math.nan
        self._shape: torch.Size | None = None
        self._updates = 0

    @property
    def device(self) -> torch.device:
        return self._device

    def train_step(self, microbatches: Iterable[ModelInputs], lr: float) -> StepResult:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        can_scale = self._scaler is not None and not self._scaler.is_least
        result = self._step(list(microbatches))
        self._updates += not result.skipped
        if result.skipped and not can_scale:
            raise non_finite_error(result)
        return result

    def trial(self, microbatches: Iterable[ModelInputs]) -> None:
        scalars = self.scalars()
        self._is_trial = True
        self._step(list(microbatches))
        self._is_trial = False
        self._load_scalars(scalars)

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[ModelInputs]) -> float:
        batches = self._as_means(list(microbatches))
        self._engine.eval()
        loss = self._evaluate(batches)
        self._engine.train()
        return self._mean_over_run(loss, len(batches))

    def state(self) -> list[ShardedTensor]:
        return list(self._sharded(self._parts()))

    def load_state(self, read: Read, scalars: Mapping[str, float]) -> None:
        parts = self._parts()
        read(list(self._sharded(parts)))
        for (name, kind), part in parts.items():
            if part is not None:
                self._state.write(self._parameters[name], kind, part)
        self._state.sync_weights()
        self._load_scalars(scalars)

    def scalars(self) -> dict[str, float]:
        scaler = {} if self._scaler is None else self._scaler.state()
        return {"updates": self._updates, **scaler}

    def _load_scalars(self, scalars: Mapping[str, float]) -> None:
        self._updates = int(scalars["updates"])
        self._state.set_updates(self._updates)
        # A save of another precision has no scale: then the initial one is as good as any.
        if self._scaler is not None and "loss_scale" in scalars:
            self._scaler.load(scalars)

    def _initialise(self, placement: Placement) -> None:
        """Give main weights their initial value, one by one; DeepSpeed knows rounded ones only."""
        config = self._config
        for name, parameter in self._parameters.items():
            part = self._state.part(parameter, WEIGHT)
            spec = self._specs[name]
            shape = spec.local_shape(self._groups.tensor.size())
            whole = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=self._device))
            set_shard_spec(whole, spec)
            init_parameter(name, whole, config.model, placement, seed=config.train.seed)
            if part is not None:
                first = whole.detach().view(-1)[part.start : part.start + part.size]
                part.flat.copy_(first)
                self._state.write(parameter, WEIGHT, part)
        self._state.sync_weights()

    def _step(self, microbatches: list[ModelInputs]) -> StepResult:
        if self._scaler is not None:
            self._scaler.begin_step()
        batches = self._as_means(microbatches)
        # Of how many microbatches gradients are added up; DeepSpeed takes each for one sample.
        self._engine.set_train_batch_size(len(batches) * self._groups.data.size())
        seed = self._config.train.seed
        loss = self._train(batches, lambda inputs: RngStreams(seed, inputs.samples))
        mean = self._mean_over_run(loss, len(batches))
        norm = self._gradient_norm()
        result = StepResult(mean, norm, not (math.isfinite(mean) and math.isfinite(norm)))
        if self._scaler is None:
            return result
        scale, skipped = self._scaler.cur_scale, self._scaler.skipped
        return replace(result, loss_scale=scale, skipped_steps=skipped)

    def _train(self, batches: list[ModelInputs], streams: Streams) -> Tensor | None:
        """Go forward and backward with all microbatches, and update; the sum of the losses."""
        if self._stage is not None:
            self._fit_buffers(batches)
            return self._stage.run(batches, streams, self._engine.train_batch)
        losses = []
        for inputs in batches:
            self._engine.set_gradient_accumulation_boundary(inputs is batches[-1])
            loss = self._engine(inputs, streams(inputs))
            losses.append(loss.detach().double())
            self._engine.backward(loss)
            self._engine.step()
        return torch.stack(losses).sum()

    def _evaluate(self, batches: list[ModelInputs]) -> Tensor | None:
        """The sum of the losses."""
        if self._stage is None:
            return torch.stack([self._engine(inputs).double() for inputs in batches]).sum()

        self._fit_buffers(batches)

        def execute(numbers: Iterator[tuple[Tensor, Tensor]]) -> None:
            self._engine.eval_batch(
                numbers, reduce_output=None, bcast_loss=False, num_micro_batches=len(batches)
            )

        return self._stage.run(batches, no_dropout, execute)

    def _fit_buffers(self, batches: list[ModelInputs]) -> None:
        """Let DeepSpeed forget the buffers that stages receive in, if they are of another size."""
        shape = batches[0].tokens.shape
        if shape != self._shape:
            self._engine.reset_activation_shape()
            self._shape = shape

    def _as_means(self, microbatches: list[ModelInputs]) -> list[ModelInputs]:
        """With weights of which the mean over microbatches and data ranks is that of the tokens."""
        sums = [inputs.loss_weights.sum(dtype=torch.float64) for inputs in microbatches]
        total = torch.stack(sums).sum()
        dist.all_reduce(total, group=self._groups.data)
        count = len(microbatches) * self._groups.data.size()
        factor = (count / total.clamp(min=1)).float()
        return [
            replace(inputs, loss_weights=inputs.loss_weights * factor) for inputs in microbatches
        ]

    def _mean_over_run(self, loss: Tensor | None, count: int) -> float:
        """The mean over the microbatches of all data ranks, from the sums of losses."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        if loss is not None:
            total += loss
        dist.all_reduce(total, group=self._groups.data)
        dist.all_reduce(total, group=self._groups.pipeline)
        return total.item() / (count * self._groups.data.size())

    def _before_update(self) -> None:
        """What the optimizer's kernel reads before it changes anything."""
        if self._config.parallel.zero == 0:
            self._own_norm = self._clip()
        skip = self._is_trial or not math.isfinite(self._gradient_norm())
        # The kernel takes it to where its parameters are, which offloading decides.
        found_inf = torch.full((), float(skip), device="cpu")
        self._optimizer.found_inf = found_inf  # type: ignore[attr-defined]

    def _gradient_norm(self) -> float:
        """L2 norm of the gradient of this step before clipping, of the whole model."""
        if self._config.parallel.zero == 0:
            return self._own_norm
        if self._engine.optimizer.overflow:
            return math.inf
        return float(self._engine.optimizer._global_grad_norm)

    def _clip(self) -> float:
        """Clip gradients to the greatest norm allowed, and return their norm before that.

        DeepSpeed's own function, at ZeRO 0, counts tied weights twice and replicated weights of all
        stages but the first not at all.
        """
        items = [(self._specs[name], item.grad) for name, item in self._parameters.items()]
        gradients = [gradient for _, gradient in items if gradient is not None]
        counted = [g for spec, g in items if g is not None and spec.is_main_replica(self._groups)]
        square = square_sum(counted, self._device)
        dist.all_reduce(square, group=self._groups.model)
        norm = square.sqrt().item()
        greatest = self._config.optimizer.max_grad_norm
        if greatest > 0:
            torch._foreach_mul_(gradients, min(1.0, greatest / (norm + 1e-6)))
        return norm

    def _parts(self) -> dict[tuple[str, str], Part | None]:
        """What this rank holds, by the name of the parameter and the kind."""
        return {
            (name, kind): self._state.part(parameter, kind)
            for kind in KINDS
            for name, parameter in self._parameters.items()
        }

    def _sharded(self, parts: Mapping[tuple[str, str], Part | None]) -> Iterator[ShardedTensor]:
        rank, size = self._groups.tensor.rank(), self._groups.tensor.size()
        for (name, kind), part in parts.items():
            spec = self._specs[name]
            boxes = () if part is None else spec.flat_boxes(part.start, part.flat, rank, size)
            cut = self._state.cut_over_data
            yield spec.sharded_tensor(kind, name, boxes, self._groups, cut_over_data=cut)
