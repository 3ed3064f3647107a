"""Weight gradients that are put off, for a pipeline to compute while it would be idle.

The gradient of a layer's input is what the stage before waits for; that of its weight can come
later. Where both would be computed at once, the latter is kept as a job instead:

    products = DeferringProducts(PLAIN)             handed to the layers
    with products.deferring() as jobs:
        torch.autograd.backward(...)                gradients of inputs, biases and norms
    ...
    for job in jobs:
        job()                                       gradients of the layers' weights
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from mpu.products import Products

Job: TypeAlias = Callable[[], None]


class DeferringProducts:
    """``Products`` whose weight gradients can be put off; every weight needs a ``main_grad``."""

    def __init__(self, products: Products) -> None:
        self._products = products
        self._jobs: list[Job] | None = None

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._products.output(x, weight, bias)

    def prepare(self, grad: Tensor) -> Tensor:
        return self._products.prepare(grad)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        return self._products.input_gradient(grad, weight)

    def weight_gradient(self, grad: Tensor, x: Tensor, total: Tensor | None) -> Tensor | None:
        if self._jobs is None:
            return self._products.weight_gradient(grad, x, total)
        assert total is not None, "there is nowhere to add the gradient to later"

        @torch.no_grad()
        def job() -> None:
            self._products.weight_gradient(grad, x, total)

        self._jobs.append(job)
        return None

    @contextmanager
    def deferring(self) -> Iterator[list[Job]]:
        """Collect the weight gradients of the backward passes inside as jobs."""
        jobs: list[Job] = []
        self._jobs = jobs
        try:
            yield jobs
        finally:
            self._jobs = None
