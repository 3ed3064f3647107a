"""What the passes of a training step need besides the state, counted on the meta device.

A microbatch is sent forward and backward through a model of two layers, built as the run builds it
among peers that do not exist. What is alive is counted at each operation, and taken apart where one
part of the model ends and the next begins:

    forward     context   embedding   layer 1   layer 2   head
    backward              embedding   layer 1   layer 2   head

Layers are alike, so that any stage is put together of these parts: what it begins with, layer 1, as
many times layer 2 as it has further layers, and what it ends with. That is counted once for all
stages and layouts that share tensor size, micro-batch and recomputation, and equals what a stage
with all its layers needs, which tests compare.

Then the tasks of a rank are gone through one by one:

    pass                 while it runs, needs            and then changes what is held by
    forward              forward                         + kept
    backward             backward, less what was kept    - kept
    gradients of inputs  the same                        - kept + deferred
    gradients of weights weight, less what was deferred  - deferred

On a GPU the element-wise chains are compiled, and need somewhat less.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from megatron.config import Backend, ModelConfig, ParallelConfig, Recompute
from megatron.engine.schedules import Pass, training_order
from megatron.model.init import build_model
from megatron.model.inputs import ModelInputs
from megatron.model.language_model import BloomForPretraining
from megatron.model.placement import Placement
from megatron.model.stages import Stage
from megatron.optim.flat_parameters import FlatParameters
from megatron.planning.absent_peers import absent_peers
from megatron.planning.live_bytes import LiveBytes
from megatron.planning.parameters import META
from mpu import PLAIN, ParallelDims, ParallelGroups, RngStreams
from mpu.cross_entropy import tokens_at_once
from mpu.deferral import DeferringProducts
from mpu.products import main_grad


@dataclass(frozen=True)
class PassShape:
    """What the memory of a pass depends on, besides the stage.

    Attributes:
        model: of which the number of layers is of no consequence.
        tensor: ranks of the tensor group.
        deferring: weight gradients are put off.
        positions: each token brings its position.
        documents: each token brings the number of its document.
        gpu_memory: bytes of a GPU, of which the head takes a share; None on a CPU.
    """

    model: ModelConfig
    backend: Backend
    dtype: torch.dtype
    micro_batch: int
    recompute: Recompute
    tensor: int
    sequence: bool
    deferring: bool = False
    positions: bool = False
    documents: bool = False
    gpu_memory: float | None = None

    @property
    def hidden_bytes(self) -> int:
        """Of the hidden states that stages exchange."""
        tokens = self.micro_batch * self.model.seq_length
        parts = self.tensor if self.sequence else 1
        return tokens // parts * self.model.hidden_size * self.dtype.itemsize


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


@dataclass(frozen=True)
class _Span:
    """A part of a pass: bytes at its end and at most, above those at its beginning."""

    change: int = 0
    most: int = 0

    def then(self, other: Self) -> "_Span":
        return _Span(self.change + other.change, max(self.most, self.change + other.most))


@dataclass(frozen=True)
class _Part:
    """What a part of the model adds to each pass of its stage."""

    forward: _Span
    backward: _Span = _Span()
    weight: _Span = _Span()

    def then(self, after: Self) -> "_Part":
        """With the part ``after`` it, through which gradients go first."""
        return _Part(
            self.forward.then(after.forward),
            after.backward.then(self.backward),
            after.weight.then(self.weight),
        )


@dataclass(frozen=True)
class _Parts:
    """The parts of a model, in order.

    Attributes:
        first_layer: makes what all layers of the stage share besides.
        layer: any other.
        held: during a layer's backward pass at most, where the gradient that it begins with is held
            until the pass is over, as a pipeline does.
    """

    context: _Part
    embedding: _Part
    first_layer: _Part
    layer: _Part
    head: _Part
    held: int


def stage_bytes(shape: PassShape, stage: Stage) -> PassBytes:
    """What the passes of a microbatch through ``stage`` need."""
    return _stage_bytes(shape, len(stage.layers), stage.first, stage.last)


@cache
def _stage_bytes(shape: PassShape, layers: int, first: bool, last: bool) -> PassBytes:
    parts, hidden = _measured(shape), shape.hidden_bytes
    whole = [parts.context, parts.embedding if first else _arriving(shape)]
    whole += [parts.first_layer, *[parts.layer] * (layers - 1)]
    # Positions of the tokens go with the forward pass; only a table of them keeps them.
    learned = shape.model.position_embedding == "learned"
    positions = 0 if shape.positions else shape.model.seq_length * torch.int64.itemsize
    if last:
        whole += [_Part(_Span(-positions if learned and not first else 0)), parts.head]
    else:
        backward = replace(whole[-1].backward, most=parts.held)
        whole[-1] = replace(whole[-1], backward=backward.then(_Span(hidden)))
        # The result leaves, and later a gradient of its size arrives.
        gone = hidden if learned and first else hidden + positions
        whole.append(_Part(_Span(-gone), _Span(hidden, hidden)))
    stage = reduce(_Part.then, whole)
    kept = stage.forward.change
    deferred = 0
    if shape.deferring:
        deferred = kept + stage.backward.change - (0 if last else hidden)
    return PassBytes(
        kept=kept,
        forward=stage.forward.most,
        backward=kept + stage.backward.most,
        deferred=deferred,
        weight=deferred + stage.weight.most if shape.deferring else 0,
    )


def _arriving(shape: PassShape) -> _Part:
    """Hidden states, instead of an embedding; and their gradient, which is sent on."""
    hidden = shape.hidden_bytes
    # Weight gradients that are put off hold the graph, which holds these two.
    return _Part(_Span(hidden, hidden), _Span(hidden if shape.deferring else -hidden))


@cache
def _measured(shape: PassShape) -> _Parts:
    with absent_peers(ParallelDims(tensor=shape.tensor)) as groups:
        model, products = _two_layers(shape, groups)
        return _send_through(shape, model, products)


def _two_layers(
    shape: PassShape, groups: ParallelGroups
) -> tuple[BloomForPretraining, DeferringProducts | None]:
    """A model with what gradients are added up in, as an engine has it."""
    deferring = DeferringProducts(PLAIN) if shape.deferring else None
    placement = Placement(
        groups.tensor,
        sequence_parallel=shape.sequence,
        dtype=shape.dtype,
        products=deferring or PLAIN,
    )
    model = build_model(
        shape.model,
        placement,
        device=META,
        backend=shape.backend,
        recompute=shape.recompute,
        stage=Stage(range(2)),
    )
    FlatParameters([model], groups, META)
    model.head_chunk = tokens_at_once(model.head_weight.size(0), shape.gpu_memory)
    return model, deferring


def _send_through(
    shape: PassShape, model: BloomForPretraining, products: DeferringProducts | None
) -> _Parts:
    """Forward and backward, with a cut between the parts of the model."""
    inputs = meta_microbatch(shape)
    given = [value for value in vars(inputs).values() if value is not None]
    gradients = [main_grad(parameter) for parameter in model.parameters()]
    buffers = [buffer for buffer in gradients if buffer is not None]
    with (
        KernelsOnMeta(),
        LiveBytes(besides=[*model.parameters(), *buffers, *given]) as live,
    ):
        cuts = _Cuts(live)
        with _cutting(model, cuts):
            output = model(inputs, RngStreams(0, inputs.samples))
        edge = get_gradient_edge(output)
        del output
        context, embedding, first, second, head = cuts.take()
        jobs: list[Callable[[], None]] = []
        if products is None:
            torch.autograd.backward(edge)
        else:
            with products.deferring() as jobs:
                torch.autograd.backward(edge)
        del edge
        head_back, second_back, first_back, embedding_back = cuts.take()
        hidden = shape.hidden_bytes
        # The jobs of a layer follow each other, those of the last layer first.
        half = len(jobs) // 2
        for job in [jobs.pop(0) for _ in range(half)]:
            job()
        later = cuts.take()[0]
    return _Parts(
        _Part(context),
        _Part(embedding, embedding_back),
        _Part(first, first_back, later),
        # What is held is that of the second layer.
        _Part(second, _Span(second_back.change - hidden, first_back.most), later),
        _Part(head, head_back),
        second_back.most,
    )


class _Cuts:
    """Takes what is alive apart."""

    def __init__(self, live: LiveBytes) -> None:
        self._live = live
        self._start = live.now
        self._spans: list[_Span] = []
        self.held: list[Tensor] = []

    def cut(self) -> None:
        """End a part."""
        most = self._live.take_peak()
        self._spans.append(_Span(self._live.now - self._start, most - self._start))
        self._start = self._live.now

    def take(self) -> list[_Span]:
        """End the last part and return all since the last call."""
        self.cut()
        spans, self._spans = self._spans, []
        return spans


@contextmanager
def _cutting(model: BloomForPretraining, cuts: _Cuts) -> Iterator[None]:
    """Cut at each part that the forward pass enters, and that the backward pass leaves.

    The gradient that the second layer's backward pass begins with is held. Recomputation enters
    layers again, when the hooks are gone.
    """
    transformer = model.language_model.transformer
    assert model.language_model.embedding is not None
    assert transformer.final_layernorm is not None

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        cuts.cut()
        hidden = inputs[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: cuts.cut())

    parts = [
        model.language_model.embedding,
        *transformer.layers.values(),
        transformer.final_layernorm,
    ]
    handles = [part.register_forward_pre_hook(enter) for part in parts]

    def hold(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        inputs[0].register_hook(cuts.held.append)

    handles.append(transformer.final_layernorm.register_forward_pre_hook(hold))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def most_held(
    parallel: ParallelConfig, rank: int, microbatches: int, passes: Sequence[PassBytes]
) -> tuple[int, int]:
    """Most bytes that a rank keeps between its tasks, and that it needs at any time.

    Args:
        rank: of the pipeline.
        microbatches: of a data rank in one step.
        passes: of each stage on the rank, in order.
    """
    # Once the pipeline is full, every group of as many microbatches as ranks is like the last.
    enough = min(microbatches, 3 * parallel.pipeline)
    kinds, chunks = _order(parallel.schedule, rank, parallel.pipeline, parallel.chunks, enough)
    # What a pass needs beside all that is held before it, and what it adds to that.
    needed, added = np.array([_needs(one) for one in passes], dtype=np.int64).transpose(2, 0, 1)
    held = np.cumsum(added[chunks, kinds])
    before = held - added[chunks, kinds]
    return int(held.max()), int((before + needed[chunks, kinds]).max())


def _needs(of: PassBytes) -> list[tuple[int, int]]:
    """Needed and added, by the kind of the pass."""
    table: Mapping[Pass, tuple[int, int]] = {
        Pass.FORWARD: (of.forward, of.kept),
        Pass.BACKWARD: (of.backward - of.kept, -of.kept),
        Pass.INPUT: (of.backward - of.kept, of.deferred - of.kept),
        Pass.WEIGHT: (of.weight - of.deferred, -of.deferred),
    }
    return [table[kind] for kind in Pass]


@cache
def _order(
    name: Any, rank: int, ranks: int, chunks: int, microbatches: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Kind and chunk of each task of a rank."""
    tasks = training_order(name, rank, ranks, chunks, microbatches)
    kinds = np.array([task.kind for task in tasks], dtype=np.int64)
    return kinds, np.array([task.stage // ranks for task in tasks], dtype=np.int64)


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


def meta_microbatch(shape: PassShape) -> ModelInputs:
    """A microbatch on the meta device, with all that the run asks for."""
    size = (shape.micro_batch, shape.model.seq_length)

    def ids() -> Tensor:
        return torch.empty(size, dtype=torch.int64, device=META)

    wide = torch.promote_types(shape.dtype, torch.float32)
    return ModelInputs(
        tokens=ids(),
        targets=ids(),
        loss_weights=torch.empty_like(ids(), dtype=wide),
        samples=torch.empty(shape.micro_batch, dtype=torch.int64, device=META),
        positions=ids() if shape.positions else None,
        documents=ids() if shape.documents else None,
    )
