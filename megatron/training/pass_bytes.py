"""What the passes of a training step need besides the state, counted on the meta device.

One microbatch goes forward and backward through each stage of a rank, on the model that the engine
built. Then the plan of the pipeline is gone through, task by task:

    pass                 while it runs, needs            and then changes what is held by
    forward              forward                         + kept
    backward             backward, less what was kept    - kept
    gradients of inputs  the same                        - kept + deferred
    gradients of weights weight, less what was deferred  - deferred

On a GPU the element-wise chains are compiled, and need somewhat less.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from megatron.config import Config
from megatron.engine.schedules import Pass, Task
from megatron.model.inputs import ModelInputs
from megatron.model.language_model import BloomForPretraining
from megatron.training.live_bytes import LiveBytes
from mpu import RngStreams
from mpu.deferral import DeferringProducts
from mpu.products import main_grad

META = torch.device("meta")


@dataclass(frozen=True)
class PassBytes:
    """What the passes of one microbatch through one stage need, in bytes.

    Attributes:
        kept: from the forward pass to the backward pass.
        forward: at most, during the forward pass.
        backward: at most, during the backward pass, with what was kept.
        deferred: of that, what the pass of the weight gradients needs, where it is one of its own.
        weight: at most, during that pass.
    """

    kept: int
    forward: int
    backward: int
    deferred: int = 0
    weight: int = 0


def measure_passes(config: Config, model: BloomForPretraining) -> PassBytes:
    """Send a microbatch through a stage whose parameters are on the meta device."""
    inputs = meta_microbatch(config)
    given = (value for value in vars(inputs).values() if value is not None)
    streams = RngStreams(config.train.seed, inputs.samples)
    gradients = (main_grad(parameter) for parameter in model.parameters())
    buffers = (buffer for buffer in gradients if buffer is not None)
    with KernelsOnMeta(), LiveBytes(besides=[*model.parameters(), *buffers, *given]) as live:
        hidden = None
        if not model.stage.first:
            hidden = model.new_hidden(*inputs.tokens.shape).requires_grad_()
        output = model(inputs, streams, hidden)
        forward = live.take_peak()
        edge = get_gradient_edge(output)
        gradient = None if model.stage.last else torch.empty_like(output)
        del output
        kept = live.now - (0 if gradient is None else gradient.nbytes)
        live.take_peak()
        products = model.placement.products
        if not isinstance(products, DeferringProducts):
            torch.autograd.backward(edge, gradient)
            return PassBytes(kept, forward, live.take_peak())
        with products.deferring() as jobs:
            torch.autograd.backward(edge, gradient)
        backward = live.take_peak()
        del edge, gradient, hidden
        deferred = live.now
        while jobs:
            jobs.pop(0)()
        return PassBytes(kept, forward, backward, deferred, live.take_peak())


def most_held(tasks: Iterable[Task], passes: Mapping[int, PassBytes]) -> tuple[int, int]:
    """Most bytes that a rank keeps between its ``tasks``, and that it needs at any time.

    Args:
        passes: of each stage on the rank, by its number in the pipeline.
    """
    held = most_kept = most = 0
    for task in tasks:
        of = passes[task.stage]
        # What the pass needs beside all that is held before it, and what it adds to that.
        needed, added = {
            Pass.FORWARD: (of.forward, of.kept),
            Pass.BACKWARD: (of.backward - of.kept, -of.kept),
            Pass.INPUT: (of.backward - of.kept, of.deferred - of.kept),
            Pass.WEIGHT: (of.weight - of.deferred, -of.deferred),
        }[task.kind]
        most = max(most, held + needed)
        held += added
        most_kept = max(most_kept, held)
    return most_kept, most


class KernelsOnMeta(TorchFunctionMode):
    """What a GPU would compute by a kernel that the meta device has no choice of."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            # All kernels that do not hold the scores keep the same.
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return func(*args, **(kwargs or {}))


def meta_microbatch(config: Config) -> ModelInputs:
    """A microbatch on the meta device, with all that the config asks for."""

    def ids() -> Tensor:
        shape = (config.train.least_micro_batch_size, config.model.seq_length)
        return torch.empty(shape, dtype=torch.int64, device=META)

    wide = torch.promote_types(config.train.torch_dtype, torch.float32)
    return ModelInputs(
        tokens=ids(),
        targets=ids(),
        loss_weights=torch.empty_like(ids(), dtype=wide),
        samples=torch.empty(config.train.least_micro_batch_size, dtype=torch.int64, device=META),
        positions=ids() if config.data.reset_position_ids else None,
        documents=ids() if config.data.reset_attention_mask else None,
    )
