"""What waits for a device is noted, and nothing else; what mixes devices is an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mpu import copy_to_device
from tests.distributed import run_ranks
from tests.pretend.device import AVAILABLE, MixedDevicesError, Watch, pretend

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch takes no device from Python")

WAITING: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda x: x.sum().item(), "_local_scalar_dense"),
    (lambda x: bool((x > 0).all()), "_local_scalar_dense"),
    (lambda x: int(x[0]), "_local_scalar_dense"),
    (lambda x: x.nonzero(), "nonzero"),
    (lambda x: torch.equal(x, x), "equal"),
    (lambda x: x.cpu(), "_to_copy"),
    (lambda x: torch.empty(3).copy_(x), "copy_"),
    (lambda x: torch.ones(3).to(x.device), "_to_copy"),
    (lambda x: torch.ones(3).to(x.device, non_blocking=True), "_to_copy.*not pinned"),
    (lambda x: torch.ones(3).pin_memory().to(x.device), "_to_copy"),
    (lambda x: x.copy_(torch.ones(3)), "copy_"),
    (lambda x: torch.tensor([1, 2], device=x.device), "_to_copy"),
    (lambda x: x.new_tensor([1.0]), "_to_copy"),
    (lambda x: x[torch.tensor([0, 1])], "index"),
]
NOT_WAITING: list[Callable[[Tensor], Any]] = [
    lambda x: (x + 1).sum(),
    lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    lambda x: copy_to_device(torch.ones(3), x.device),
    lambda x: torch.zeros(3, device=x.device).fill_(2),
    lambda x: x * torch.tensor(2.0),
    lambda x: x[x.long()],
    lambda x: x.to(torch.bfloat16),
    lambda x: x.clone().copy_(x),
    lambda x: torch.ones(3).sum().item(),
]
MIXED: list[Callable[[Tensor], Any]] = [
    lambda x: x + torch.ones(3),
    lambda x: torch.stack([x, torch.ones(3)]),
    lambda x: torch.where(torch.ones(3) > 0, x, x),
    lambda x: x.index_add_(0, torch.arange(3), x),
]


def test_waits_and_mixtures_are_told_from_what_is_right() -> None:
    run_ranks(1, check_operations)


def check_operations() -> None:
    device = pretend()
    for number, (action, cause) in enumerate(WAITING):
        (wait,) = waits_of(action, device)
        with pytest.raises(AssertionError, match=cause):
            raise AssertionError(wait)
        assert "tests/pretend" not in wait, number
    for number, allowed in enumerate(NOT_WAITING):
        assert waits_of(allowed, device) == [], number
    for mixed in MIXED:
        with pytest.raises(MixedDevicesError):
            waits_of(mixed, device)


def waits_of(action: Callable[[Tensor], Any], device: torch.device) -> list[str]:
    with Watch() as watch, watch.phase("test"):
        x = torch.ones(3, device=device)
        action(x)
    return [str(wait) for wait in watch.waits]


def test_gradients_are_on_the_device() -> None:
    run_ranks(1, check_gradients)


def check_gradients() -> None:
    with Watch() as watch:
        x = torch.ones(3, device=pretend(), requires_grad=True)
        (x * 2).sum().backward()
        assert x.grad is not None
        assert x.grad.device == x.device
    assert watch.waits == []
