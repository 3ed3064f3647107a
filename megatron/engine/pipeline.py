"""Runs a schedule: computes this rank's stages, and exchanges hidden states and their gradients.

A process without a pipeline is one with a single stage, whose schedule is forward and backward of
each microbatch in turn.

Torch has schedules of its own (``torch.distributed.pipelining``), against which the orders here are
tested. Its executor keeps a buffer for every hidden state of a step, however many microbatches
there are, where two for each microbatch in flight do, and it cuts one batch into microbatches
itself, where ours arrive as they are, with the numbers of their samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed import ProcessGroup

from megatron.config import ParallelConfig
from megatron.engine.schedules import (
    Pass,
    Plan,
    Task,
    Transfer,
    plan_evaluation,
    plan_training,
)
from megatron.model.inputs import ModelInputs
from megatron.model.language_model import BloomForPretraining
from mpu import RngStreams
from mpu.deferral import DeferringProducts, Job

_MOST_SENT = 4
"""Tensors that are kept because they may still be on their way."""

Streams: TypeAlias = Callable[[ModelInputs], RngStreams | None]
"""The random numbers of a microbatch; None is no dropout."""


class Pipeline:
    """The stages on this rank, and how a step goes through them.

    Args:
        models: stages of this rank, in order.
        deferral: the products of their layers, for the schedule that puts weight gradients off.
    """

    def __init__(
        self,
        models: Sequence[BloomForPretraining],
        group: ProcessGroup,
        config: ParallelConfig,
        deferral: DeferringProducts | None,
    ) -> None:
        self._models = models
        self._group = group
        self._config = config
        self._deferral = deferral

    def train(self, microbatches: Sequence[ModelInputs], streams: Streams) -> Tensor | None:
        """Add the gradients of all microbatches to those of the parameters. Collective.

        Returns:
            The sum of their losses, a float64 scalar; None on a rank without the last stage.
        """
        config = self._config
        plan = _plan_training(config, len(microbatches))
        return _Execution(self, plan, microbatches, streams, self._deferral).run()

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[ModelInputs]) -> Tensor | None:
        """The sum of the losses without dropout, as ``train`` returns it. Collective."""
        plan = plan_evaluation(self._config.pipeline, self._config.chunks, len(microbatches))
        return _Execution(self, plan, microbatches, lambda _: None, None).run()

    @property
    def group(self) -> ProcessGroup:
        return self._group

    def model(self, stage: int) -> BloomForPretraining:
        """The model of a stage of this rank."""
        return self._models[stage // self._group.size()]


@cache
def _plan_training(config: ParallelConfig, microbatches: int) -> Plan:
    return plan_training(config.schedule, config.pipeline, config.chunks, microbatches)


@dataclass
class _Forward:
    """What the backward pass of a microbatch through a stage needs."""

    hidden: Tensor | None
    output: GradientEdge


@dataclass
class _Execution:
    """One run of a plan."""

    pipeline: Pipeline
    plan: Plan
    microbatches: Sequence[ModelInputs]
    streams: Streams
    deferral: DeferringProducts | None
    loss: Tensor | None = None
    forwards: dict[tuple[int, int], _Forward] = field(default_factory=dict)
    jobs: dict[int, list[Job]] = field(default_factory=dict)
    outgoing: dict[Task, Tensor] = field(default_factory=dict)
    incoming: dict[Task, tuple[Tensor, dist.Work]] = field(default_factory=dict)
    sending: list[tuple[Tensor, dist.Work]] = field(default_factory=list)

    def run(self) -> Tensor | None:
        rank = self.pipeline.group.rank()
        for step in self.plan.steps[rank]:
            if isinstance(step, Task):
                self._compute(step)
            elif step.source == rank:
                self._send(step)
            else:
                self._receive(step)
        for _, work in self.sending:
            work.wait()
        return self.loss

    def _compute(self, task: Task) -> None:
        if task.kind is Pass.FORWARD:
            self._forward(task)
        elif task.kind is Pass.BACKWARD:
            self._backward(task)
        elif task.kind is Pass.INPUT:
            assert self.deferral is not None
            with self.deferral.deferring() as self.jobs[task.microbatch]:
                self._backward(task)
        else:
            for job in self.jobs.pop(task.microbatch):
                job()

    def _forward(self, task: Task) -> None:
        model, inputs = self.pipeline.model(task.stage), self.microbatches[task.microbatch]
        hidden = None
        if not model.stage.first:
            hidden = self._received(Task(Pass.FORWARD, task.stage - 1, task.microbatch))
            hidden.requires_grad_(torch.is_grad_enabled())
        output = model(inputs, self.streams(inputs), hidden)
        if torch.is_grad_enabled():
            # Not the output itself: nothing but the next stage needs its values.
            forward = _Forward(hidden, get_gradient_edge(output))
            self.forwards[task.stage, task.microbatch] = forward
        if model.stage.last:
            loss = output.detach().double()
            self.loss = loss if self.loss is None else self.loss + loss
        else:
            self.outgoing[task] = output.detach()

    def _backward(self, task: Task) -> None:
        forward = self.forwards.pop((task.stage, task.microbatch))
        gradient = None
        if not self.pipeline.model(task.stage).stage.last:
            gradient = self._received(Task(task.kind, task.stage + 1, task.microbatch))
        torch.autograd.backward(forward.output, gradient)
        if forward.hidden is not None:
            assert forward.hidden.grad is not None
            self.outgoing[task] = forward.hidden.grad

    def _send(self, transfer: Transfer) -> None:
        tensor = self.outgoing.pop(transfer.task).contiguous()
        work = dist.isend(tensor, group=self.pipeline.group, group_dst=transfer.target)
        assert work is not None, "this rank is not in the group"
        # What has been sent can go; gloo does not tell before it is asked to wait.
        self.sending = [item for item in self.sending if not item[1].is_completed()]
        self.sending.append((tensor, work))
        if len(self.sending) > _MOST_SENT:
            self.sending.pop(0)[1].wait()

    def _receive(self, transfer: Transfer) -> None:
        model = self.pipeline.model(transfer.stage)
        batch, seq = self.microbatches[transfer.task.microbatch].tokens.shape
        tensor = model.new_hidden(batch, seq)
        work = dist.irecv(tensor, group=self.pipeline.group, group_src=transfer.source)
        assert work is not None, "this rank is not in the group"
        self.incoming[transfer.task] = (tensor, work)

    def _received(self, task: Task) -> Tensor:
        tensor, work = self.incoming.pop(task)
        work.wait()
        return tensor
