"""Products in fp8 on tensor cores, compiled, against their emulation on the CPU."""

import pytest
import torch

from megatron.model.fp8 import Fp8Products, fp8_products
from tests.figures import Figure
from tests.megatron.model.test_fp8 import all_products

GPU = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a GPU of compute capability 8.9 or above",
    ),
]


def test_tensor_cores_compute_what_is_emulated(figure: Figure) -> None:
    x = torch.randn(2, 128, 256).bfloat16()
    weight = (torch.randn(512, 256) * 0.02).bfloat16()
    grad = (torch.randn(2, 128, 512) * 1e-6).bfloat16()
    want = all_products(Fp8Products(emulate=True), x, weight, grad)
    got = all_products(fp8_products(GPU), x.to(GPU), weight.to(GPU), grad.to(GPU))
    errors = {}
    for name, expected in want.items():
        found = got[name]
        assert found is not None
        assert expected is not None
        difference = found.cpu().double() - expected.double()
        errors[name.replace(" ", "_")] = (difference.norm() / expected.double().norm()).item()
    figure("fp8 on tensor cores against emulation, relative error", **errors)
    # Both round to bfloat16, and tensor cores add up fewer bits than float32 has.
    assert max(errors.values()) < 2**-7
