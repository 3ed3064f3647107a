"""The training step with one change undone, or made: contexts in which an engine takes its steps.

Each replaces, while entered, one function or attribute of the product by what was there before the
change; the weights, the optimizer and the loss stay the same.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial
from inspect import unwrap
from typing import Literal, TypeAlias
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from megatron.config import Backend
from megatron.engine.torch_engine import TorchEngine
from megatron.model.activations import activate
from megatron.model.fusion import bias_dropout_add
from megatron.model.transformer import ParallelAttention, ParallelTransformerLayer
from mpu.collectives import Done, all_reduce

Ablation: TypeAlias = Literal[
    "explicit attention",
    "sdpa attention",
    "plain head",
    "new logits",
    "large parts",
    "autograd gradients",
    "foreach AdamW",
    "denormal numbers",
    "native bf16 products",
    "torch's float32 products",
    "sums in turn",
    "compiled layers",
    "eager chains",
    "loss read at once",
]
Context: TypeAlias = Callable[[TorchEngine], AbstractContextManager[object]]


def _modules(engine: TorchEngine) -> Iterator[nn.Module]:
    for model in engine.models:
        yield from model.modules()


@contextmanager
def _attention(backend: Backend, engine: TorchEngine) -> Iterator[None]:
    with ExitStack() as stack:
        for module in _modules(engine):
            if isinstance(module, ParallelAttention):
                stack.enter_context(mock.patch.object(module, "backend", backend))
        yield


def _plain_head(engine: TorchEngine) -> AbstractContextManager[object]:
    name = "megatron.model.language_model.vocab_parallel_linear_cross_entropy"
    return mock.patch(name, _all_logits)


def _all_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, **_: object
) -> Tensor:
    logits = F.linear(hidden, weight).float().flatten(0, -2)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return (losses * token_weights.flatten()).sum()


def _new_logits(engine: TorchEngine) -> AbstractContextManager[object]:
    product = torch.mm
    return mock.patch("torch.mm", lambda a, b, *, out: product(a, b))


@contextmanager
def _autograd_gradients(engine: TorchEngine) -> Iterator[None]:
    parameters = [p for model in engine.models for p in model.parameters()]
    with ExitStack() as stack:
        for parameter in parameters:
            stack.enter_context(mock.patch.object(parameter, "main_grad", None))
        yield


def _foreach_adamw(engine: TorchEngine) -> AbstractContextManager[object]:
    return mock.patch("megatron.engine.torch_engine.update", _foreach_update)


def _foreach_update(optimizer: Optimizer, lr: float, skip: Tensor) -> None:
    with ExitStack() as stack:
        for group in optimizer.param_groups:
            settings = {"lr": lr, "fused": False, "foreach": True}
            stack.enter_context(mock.patch.dict(group, settings))
        stack.enter_context(mock.patch.object(optimizer, "found_inf", None, create=True))
        optimizer.step()


@contextmanager
def _denormal_numbers(engine: TorchEngine) -> Iterator[None]:
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)


def _native_products(engine: TorchEngine) -> AbstractContextManager[object]:
    return mock.patch("mpu.products._multiplies_float32_faster", return_value=False)


def _torch_products(engine: TorchEngine) -> AbstractContextManager[object]:
    return mock.patch("mpu.products._has_faster_onednn", return_value=False)


def _large_parts(engine: TorchEngine) -> AbstractContextManager[object]:
    return mock.patch("mpu.products._WEIGHT_BYTES", 2**40)


def _sums_in_turn(engine: TorchEngine) -> AbstractContextManager[object]:
    return mock.patch("mpu.layers.start_all_reduce", _finished_all_reduce)


def _finished_all_reduce(x: Tensor, group: ProcessGroup) -> Done:
    return Done(all_reduce(x, group))


@contextmanager
def _compiled_layers(engine: TorchEngine) -> Iterator[None]:
    with ExitStack() as stack:
        for module in _modules(engine):
            if isinstance(module, ParallelTransformerLayer):
                forward = _compiled_forward(module)
                stack.enter_context(mock.patch.object(module, "forward", forward))
        yield


@cache
def _compiled_forward(layer: ParallelTransformerLayer) -> Callable[..., Tensor]:
    return torch.compile(layer.forward, dynamic=False)


@contextmanager
def _eager_chains(engine: TorchEngine) -> Iterator[None]:
    with ExitStack() as stack:
        for function in (activate, bias_dropout_add):
            name = f"megatron.model.transformer.{function.__name__}"
            stack.enter_context(mock.patch(name, unwrap(function)))
        yield


@contextmanager
def _loss_read_at_once(engine: TorchEngine) -> Iterator[None]:
    handle = engine.models[-1].register_forward_hook(lambda _, __, loss: loss.item())
    try:
        yield
    finally:
        handle.remove()


ABLATIONS: Mapping[Ablation, Context] = {
    "explicit attention": partial(_attention, "explicit"),
    "sdpa attention": partial(_attention, "sdpa"),
    "plain head": _plain_head,
    "new logits": _new_logits,
    "large parts": _large_parts,
    "autograd gradients": _autograd_gradients,
    "foreach AdamW": _foreach_adamw,
    "denormal numbers": _denormal_numbers,
    "native bf16 products": _native_products,
    "torch's float32 products": _torch_products,
    "sums in turn": _sums_in_turn,
    "compiled layers": _compiled_layers,
    "eager chains": _eager_chains,
    "loss read at once": _loss_read_at_once,
}
