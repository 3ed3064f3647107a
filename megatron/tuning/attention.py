"""Which attention backend a run computes with.

    model.attention_backend   backend
    a name                    that one, or an error where it cannot be used
    auto, on a CPU            blocked
    auto, on a GPU            the fastest of those that can do the work, by a measurement

Another backend rounds differently, so a run that goes on from a save keeps the backend of the save
as long as the config leaves the choice open and the kind of device is the same.

The measurement is in the shape of the run. Where the run finds its micro-batch size itself, it does
so later, with the backend; that is measured with one sample.

On a CPU nothing is measured. Forward and backward of 2 x 8 heads, 512 tokens and head size 64 took
blocked 20 to 28 ms in float32 and 32 to 37 in bfloat16 on one core, sdpa 34 to 41 and 60 to 70,
explicit 71 to 84 and 69 to 82. At 2048 tokens of 16 heads sdpa took 0.76 times as long as blocked
in float32 and 0.93 times in bfloat16; its rounding error in float32 is five to ten times as large.
A measurement could only make the choice, and with it the last bits of the losses, differ from one
start to the next.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.distributed import ProcessGroup

from megatron.config import Backend, Config
from megatron.errors import ConfigError
from megatron.model.alibi import alibi_slopes
from megatron.model.attention import AttentionBias, attention, candidates, runs_on
from megatron.together import run_on_first

logger = logging.getLogger(__name__)

Timer: TypeAlias = Callable[[Callable[[], None]], float]
"""Calls an action and gives its duration in milliseconds."""

_WARM_UP, _ROUNDS = 3, 10


@dataclass(frozen=True)
class AttentionChoice:
    """A backend, and the kind of device that it was chosen for."""

    backend: Backend
    device: str

    def to_state(self) -> dict[str, str]:
        """What a save keeps of it."""
        return {"attention_backend": self.backend, "device": self.device}


def choose_backend(
    config: Config,
    device: torch.device,
    saved: Mapping[str, Any],
    *,
    group: ProcessGroup | None,
    timer: Timer | None = None,
) -> AttentionChoice:
    """The backend of a run. Collective: all ranks of ``group`` get the choice of its first.

    Args:
        saved: the state of the save that the run goes on from; empty at a fresh start.
        timer: measures on ``device``; default: by CUDA events.

    Raises:
        ConfigError: for a backend that cannot be used on ``device``.
    """
    named = config.model.attention_backend
    if named != "auto":
        _check_device(named, device)
        return AttentionChoice(named, device.type)
    able = candidates(config, device)
    if len(able) == 1:
        backend, reason = able[0], f"the one for auto on {device.type}"
    elif saved.get("device") == device.type and saved.get("attention_backend") in able:
        backend, reason = saved["attention_backend"], "as at the save"
    else:
        backend, reason = _fastest(config, device, able, group, timer or time_on_gpu)
    logger.info("attention backend %s: %s", backend, reason)
    return AttentionChoice(backend, device.type)


def measure(
    config: Config, device: torch.device, able: list[Backend], timer: Timer
) -> dict[Backend, float]:
    """Milliseconds of one layer's attention, forward and backward, of a microbatch on one rank.

    A backend that fails, as a compiler may that does not know the device, is left out.
    """
    found: dict[Backend, float] = {}
    for backend in able:
        action = _one_layer(config, device, backend)
        try:
            for _ in range(_WARM_UP):
                action()
            found[backend] = min(timer(action) for _ in range(_ROUNDS))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            logger.warning("attention backend %s is left out: %s", backend, reason)
    return found


def time_on_gpu(action: Callable[[], None]) -> float:
    """Milliseconds that ``action`` keeps the GPU busy."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    action()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def _check_device(backend: Backend, device: torch.device) -> None:
    if runs_on(backend, device):
        return
    needs = "a GPU" if device.type != "cuda" else "the package flash-attn, which is not installed"
    raise ConfigError(
        f"model.attention_backend {backend} needs {needs}; the device is {device.type}",
        on_every_rank=True,
    )


def _fastest(
    config: Config,
    device: torch.device,
    able: list[Backend],
    group: ProcessGroup | None,
    timer: Timer,
) -> tuple[Backend, str]:
    """The backend, and why: what was measured."""
    found = run_on_first(lambda: measure(config, device, able, timer), group)
    if not found:
        raise ConfigError(
            f"model.attention_backend auto: none of {', '.join(able)} works on this device",
            on_every_rank=True,
        )
    texts = (f"{name} {milliseconds:.3g} ms" for name, milliseconds in found.items())
    return min(found, key=lambda name: found[name]), f"the fastest of {', '.join(texts)} a layer"


def _one_layer(config: Config, device: torch.device, backend: Backend) -> Callable[[], None]:
    """Forward and backward of the core of one layer, in the shape of the run."""
    model, size = config.model, config.train.least_micro_batch_size
    heads = model.num_heads // config.parallel.tensor
    shape = (size, model.seq_length, heads, model.head_size)
    leaves = [
        torch.randn(shape, dtype=config.train.torch_dtype, device=device).requires_grad_()
        for _ in range(3)
    ]
    slopes = documents = None
    if model.position_embedding == "alibi":
        slopes = alibi_slopes(model.num_heads)[:heads].to(device)
    if config.data.reset_attention_mask:
        documents = torch.zeros(shape[:2], dtype=torch.int64, device=device)
        documents[:, model.seq_length // 2 :] = 1

    def action() -> None:
        query, key, value = (x.transpose(1, 2) for x in leaves)
        bias = AttentionBias(documents, slopes, model.alibi_precision)
        out = attention(query, key, value, bias, backend=backend)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return action
