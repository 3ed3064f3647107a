"""Checks of values, which make nobody wait."""

from collections.abc import Callable

import torch
from torch import Tensor


def check_all(allowed: Tensor, message: Callable[[], str]) -> None:
    """Refuse what is not ``allowed`` everywhere.

    On a GPU the verdict is not read, for which the CPU would wait; the GPU stops by itself.

    Raises:
        ValueError: with ``message``, on a CPU.
    """
    verdict = allowed.all()
    if allowed.device.type != "cpu":
        torch._assert_async(verdict)
    elif not verdict:
        raise ValueError(message())
