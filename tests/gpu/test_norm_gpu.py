"""The gradient norm on a GPU is that of float64, too, and takes no copy of the gradient."""

import pytest
import torch

from megatron.optim.parameters import square_sum
from tests.figures import Figure
from tests.megatron.optim.test_parameters import TOLERANCE, VALUES, exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

GPU = torch.device("cuda")


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("size", [2**10, 2**16 + 1, 2**24, 2**26])
def test_norm_is_that_of_float64(size: int, kind: str, figure: Figure) -> None:
    torch.manual_seed(size)
    values = VALUES[kind](size)
    gradient = values.to(GPU).contiguous()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    norm = square_sum([gradient], GPU).sqrt().item()
    assert torch.cuda.max_memory_allocated() - before <= gradient.nbytes / 4 + 2**22
    error = abs(norm / exact(values) - 1)
    figure("gradient norm on a GPU beside float64", error=error)
    assert error <= TOLERANCE


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_through(value: float) -> None:
    for place in (0, 2**25 + 1, 2**26 - 1):
        gradient = torch.ones(2**26, device=GPU)
        gradient[place] = value
        assert not square_sum([gradient], GPU).isfinite()
