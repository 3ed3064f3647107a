"""The Triton kernels of the softmax, compiled: the checks of the CPU on larger shapes."""

import pytest
import torch

from megatron.model.fused_softmax import FusedScaleMaskSoftmax
from megatron.model.softmax_kernels import DTYPES, fused_scale_mask_softmax, is_available
from tests.figures import Figure
from tests.megatron.model.softmax_cases import SCALE, Shape, cases, worst_errors

GPU = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and is_available(GPU)), reason="needs a GPU and Triton"
    ),
]

SHAPES = [
    Shape(1, 1, 1, 1),
    Shape(3, 2, 1, 2, query_start=1),
    Shape(2, 5, 17, 17),
    Shape(2, 3, 203, 509, query_start=306),
    Shape(2, 16, 1024, 1024),
    Shape(1, 4, 2048, 2048),
    Shape(2, 4, 1, 4095, query_start=4094),
    Shape(1, 2, 100, 8193, query_start=8150),
    Shape(1, 2, 64, 16384, query_start=8000),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_kernels_are_within_rounding_of_float64(
    shape: Shape, dtype: torch.dtype, figure: Figure
) -> None:
    for case in cases(shape, dtype, GPU):
        forward, backward = worst_errors(fused_scale_mask_softmax, case)
        figure(f"compiled softmax {dtype}, error / rounding", forward=forward, backward=backward)
        assert max(forward, backward) <= 1


def test_module_takes_the_kernels() -> None:
    scores = torch.randn(1, 2, 3, 5, device=GPU)
    want = fused_scale_mask_softmax(scores, SCALE, None, None, 0)
    assert torch.equal(FusedScaleMaskSoftmax(SCALE)(scores), want)


def test_more_elements_than_int32_counts() -> None:
    size = (1, 33, 8192, 8192)
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    scores = torch.zeros(size, dtype=torch.bfloat16, device=GPU).requires_grad_()
    p = fused_scale_mask_softmax(scores, SCALE, None, None, 0)
    assert (p[0, -1, -1] == 1 / 8192).all()
    # The last query prefers one key: dscores = scale p (dp - sum(p dp)).
    grad = torch.zeros_like(p)
    grad[0, -1, -1, -1] = 8192
    (dscores,) = torch.autograd.grad(p, scores, grad)
    last = dscores[0, -1, -1].double()
    torch.testing.assert_close(last[0].item(), -SCALE / 8192, rtol=2**-8, atol=0)
    torch.testing.assert_close(last[-1].item(), SCALE * 8191 / 8192, rtol=2**-8, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_gpu_of_the_scores() -> None:
    scores = torch.randn(1, 2, 3, 5, device="cuda:1")
    got = fused_scale_mask_softmax(scores, SCALE, None, None, 0)
    want = fused_scale_mask_softmax(scores.to("cuda:0"), SCALE, None, None, 0)
    assert torch.equal(got.cpu(), want.cpu())
