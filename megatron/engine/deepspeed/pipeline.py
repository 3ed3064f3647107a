"""A pipeline stage as DeepSpeed's pipeline engine wants it.

DeepSpeed passes tensors from stage to stage, and gives data to the first and the last stage only.
Every stage here needs more than that of a microbatch: the numbers of its samples, for dropout, and
its documents. All ranks have read them anyway, so a stage takes its microbatches in turn from a
list, and what DeepSpeed passes as data is nothing but their numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.engine.deepspeed.grid import Grid
from megatron.model.inputs import ModelInputs
from megatron.model.language_model import BloomForPretraining
from mpu import ParallelGroups, RngStreams, shard_spec

Streams: TypeAlias = Callable[[ModelInputs], RngStreams | None]
"""The random numbers of a microbatch; None is no dropout."""

Execute: TypeAlias = Callable[[Iterator[tuple[Tensor, Tensor]]], object]
"""DeepSpeed's way through the pipeline, with what the first and the last stage are given."""


def no_dropout(inputs: ModelInputs) -> None:
    """Streams of an evaluation."""


class PipelineStage(PipelineModule):
    """The stage of this rank.

    DeepSpeed's own constructor would build layers one by one, and process groups; here both are
    there already. What it sets otherwise, and its engine reads, is set below.
    """

    def __init__(self, model: BloomForPretraining, groups: ParallelGroups) -> None:
        nn.Module.__init__(self)
        self.model = model
        self._grid = Grid(groups)
        self._tied = list(_tied_weights(model, groups.embedding))
        self._microbatches: Iterator[ModelInputs] = iter(())
        self._streams: Streams = no_dropout
        self._loss: Tensor | None = None
        rank = groups.pipeline.rank()
        self._local_start, self._local_stop = rank, rank + 1
        self.micro_offset = 0
        self.loss_fn = None
        self.tied_comms: dict[str, Any] = {}
        self.activation_checkpoint_interval = 0
        self.dynamic_shape = False

    def run(
        self, microbatches: Sequence[ModelInputs], streams: Streams, execute: Execute
    ) -> Tensor | None:
        """Let ``execute`` take ``microbatches`` through the pipeline.

        Returns:
            The sum of their losses, a float64 scalar; None on a rank without the last stage.
        """
        self._microbatches, self._streams, self._loss = iter(microbatches), streams, None
        numbers = torch.arange(len(microbatches), device=microbatches[0].tokens.device)
        execute((number, number) for number in numbers)
        return self._loss

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states of the stage before, or the number of a microbatch, of the next one."""
        inputs = next(self._microbatches)
        hidden = None if self.model.stage.first else x
        output: Tensor = self.model(inputs, self._streams(inputs), hidden)
        if self.model.stage.last:
            loss = output.detach().double()
            self._loss = loss if self._loss is None else self._loss + loss
        return output

    def get_tied_weights_and_groups(self) -> list[tuple["_TiedGradient", ProcessGroup]]:
        """What has the gradients that two stages sum up, and the group of the two."""
        return self._tied

    def mpu(self) -> Grid:
        return self._grid


class _TiedGradient:
    """A tied weight, as far as DeepSpeed looks at it to sum up its gradient.

    It looks for it in ``grad``, but under fp16 adds it up elsewhere, so that the copies of the
    weight would go ways of their own.
    """

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter

    @property
    def grad(self) -> Tensor | None:
        added: Tensor | None = getattr(self._parameter, "grad_accum", None)
        return self._parameter.grad if added is None else added

    @property
    def _hp_grad(self) -> Tensor:
        """Where it is added up under bf16."""
        return self._parameter._hp_grad


def _tied_weights(
    model: nn.Module, group: ProcessGroup
) -> Iterator[tuple[_TiedGradient, ProcessGroup]]:
    for parameter in model.parameters():
        if shard_spec(parameter).tied:
            yield _TiedGradient(parameter), group
