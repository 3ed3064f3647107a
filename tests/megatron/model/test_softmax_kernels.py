"""The Triton kernels of the softmax, interpreted on the CPU, and compiled for a GPU but not run.

Triton decides when it is imported whether it interprets, so that takes a process of its own.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from megatron.model import softmax_kernels
from megatron.model.fused_softmax import FusedScaleMaskSoftmax, scale_mask_softmax
from tests.figures import Figure
from tests.megatron.model.softmax_cases import SCALE, Shape, cases, worst_errors

triton = pytest.importorskip("triton")
ASTSource = triton.compiler.ASTSource
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget

Constants: TypeAlias = dict[str, int | None]

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
LONGER_THAN_A_BLOCK = 8192 + 809
INTEGERS = ("batch_stride", "query_stride", "key_stride", "query_start", "num_keys")

SHAPES = [
    Shape(1, 1, 1, 1),
    Shape(1, 1, 3, 1),
    Shape(3, 2, 1, 2, query_start=1),
    Shape(2, 3, 5, 5),
    Shape(1, 5, 3, 16, query_start=13),
    Shape(2, 1, 7, 7),
    Shape(1, 2, 17, 17),
    Shape(2, 2, 3, 33, query_start=30),
    Shape(1, 3, 4, 11, query_start=2),
    Shape(1, 1, 9, 4),
    Shape(1, 1, 2, LONGER_THAN_A_BLOCK, query_start=20),
    Shape(1, 2, 1, 16384, query_start=16383),
]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets its kernels."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert pool.submit(softmax_kernels.is_available, CPU).result()
        yield pool


@pytest.mark.parametrize("dtype", softmax_kernels.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_within_rounding_of_float64(
    shape: Shape, dtype: torch.dtype, interpreter: ProcessPoolExecutor, figure: Figure
) -> None:
    forward, backward = interpreter.submit(worst_of_kernels, shape, dtype).result()
    figure(f"kernel softmax {dtype}, error / rounding", forward=forward, backward=backward)
    assert max(forward, backward) <= 1


def worst_of_kernels(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    torch.manual_seed(0)
    # Triton's interpreter does not round to bfloat16; see the test of the compiled kernels.
    truncates = dtype == torch.bfloat16
    errors = [
        worst_errors(softmax_kernels.fused_scale_mask_softmax, case, truncates=truncates)
        for case in cases(shape, dtype, CPU)
    ]
    return max(forward for forward, _ in errors), max(backward for _, backward in errors)


@pytest.mark.parametrize("dtype", softmax_kernels.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_operations_are_within_the_same_rounding(shape: Shape, dtype: torch.dtype) -> None:
    for case in cases(shape, dtype, CPU):
        assert max(worst_errors(scale_mask_softmax, case)) <= 1


def test_module_takes_the_kernels_where_they_run(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(check_module_takes_the_kernels).result()


def check_module_takes_the_kernels() -> None:
    torch.manual_seed(0)
    scores = torch.randn(1, 2, 3, 5, requires_grad=True)
    got = FusedScaleMaskSoftmax(SCALE)(scores)
    want = softmax_kernels.fused_scale_mask_softmax(scores, SCALE, None, None, 0)
    assert torch.equal(got, want)
    assert type(got.grad_fn) is type(want.grad_fn)
    double = FusedScaleMaskSoftmax(SCALE)(scores.double())
    assert type(double.grad_fn) is not type(want.grad_fn)


def test_arguments_may_have_any_strides(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(check_strides).result()


def check_strides() -> None:
    torch.manual_seed(0)
    strided = (
        torch.randn(2, 5, 2, 3).transpose(1, 3),
        torch.rand(5, 2, 1, 2).permute(3, 2, 1, 0) < 0.5,
        torch.tensor([0.5, 9.0, 0.25, 9.0, 0.125, 9.0])[::2],
        torch.randn(3, 2, 2, 5).transpose(0, 1),
    )
    assert not any(x.is_contiguous() for x in strided)
    got = forward_and_backward(*strided)
    want = forward_and_backward(*(x.contiguous() for x in strided))
    assert all(map(torch.equal, got, want))


def forward_and_backward(
    scores: Tensor, visible: Tensor, slopes: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Probabilities and the gradient of the scores."""
    scores.requires_grad_()
    p = softmax_kernels.fused_scale_mask_softmax(scores, SCALE, visible, slopes, 0)
    (dscores,) = torch.autograd.grad(p, scores, grad)
    return p, dscores


def test_without_triton_the_torch_operations_run() -> None:
    program = """
import sys, torch
sys.modules["triton"] = None
from megatron.model import fused_softmax, softmax_kernels
assert not softmax_kernels.is_available(torch.device("cuda"))
fused_softmax.FusedScaleMaskSoftmax(1.0)(torch.zeros(1, 1, 2, 2))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


KERNELS = [softmax_kernels._forward, softmax_kernels._backward]
NO_MASK = {"visible": None}


@pytest.mark.parametrize("constants", [{}, NO_MASK], ids=["mask", "causal"])
@pytest.mark.parametrize("one_block", [False, True])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_compiled_kernels_move_16_bytes_at_a_time_and_round(
    kernel: Any, one_block: bool, constants: Constants, compiler_cache: None
) -> None:
    constants = {"key_stride": 1, "one_block": one_block, **constants}
    ptx = compile_for_gpu(kernel, constants).asm["ptx"]
    assert re.findall(r"ld\.global\S*\.[bu](?:8|16)\b", ptx) == []
    assert set(re.findall(r"(?:ld|st)\.global\S*(v4\.b32)", ptx)) == {"v4.b32"}
    assert "cvt.rn.bf16" in ptx


# Triton makes constants of what is None or 1, and then compiles other code.
@pytest.mark.parametrize(
    "ones",
    [("num_keys",), ("query_start",), ("batch_stride", "query_stride"), ("num_keys", "key_stride")],
    ids=str,
)
@pytest.mark.parametrize("constants", [{}, NO_MASK, {"slopes": None}], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_kernels_compile_whatever_is_constant(
    kernel: Any, constants: Constants, ones: tuple[str, ...], compiler_cache: None
) -> None:
    constants = {**constants, **dict.fromkeys(ones, 1), "one_block": True}
    assert compile_for_gpu(kernel, constants).asm["cubin"]


@pytest.fixture
def compiler_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of Triton's, so that it compiles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_for_gpu(kernel: Any, constants: Constants) -> Any:
    """``kernel`` for bfloat16; all other integers are known to be multiples of 16."""
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    constants["block"] = 2048
    types = {"visible": "*i1", "slopes": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(INTEGERS, "i32")
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*bf16")
        for name in kernel.arg_names
    }
    multiples_of_16 = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name not in {*constants, "scale", "query_start"}
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, multiples_of_16),
        target=GPUTarget("cuda", 90, warp_size=32),
        options={"enable_fp_fusion": True},
    )
