"""What needs a GPU: the numbers of the CPU again, and bf16 within its rounding of fp32."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.config import ModelConfig
from megatron.model.alibi import alibi_slopes
from megatron.model.attention import AttentionBias, Backend, attention
from megatron.model.init import build_model, init_parameters
from megatron.model.inputs import ModelInputs
from megatron.model.placement import Placement
from mpu import ParallelDims, RngStreams, build_groups, dropout
from tests.distributed import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CPU, GPU = torch.device("cpu"), torch.device("cuda")

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=128,
    num_heads=4,
    vocab_size=509,
    seq_length=96,
    hidden_dropout=0.1,
)


@pytest.mark.parametrize("backend", ["explicit", "sdpa"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_on_the_gpu_equals_one_on_the_cpu(backend: Backend, recompute: Any) -> None:
    config = replace(CONFIG, attention_backend=backend)
    run_ranks(1, check_step_equals_cpu, config, recompute)


def check_step_equals_cpu(config: ModelConfig, recompute: Any) -> None:
    want_loss, want = gradients(config, CPU, torch.float64, "none")
    loss, grads = gradients(config, GPU, torch.float64, recompute)
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=0)
    for name, grad in grads.items():
        error = (grad - want[name]).abs().max() / want[name].abs().max()
        assert error < 1e-11, f"{name}: {error}"


@pytest.mark.parametrize("backend", ["explicit", "sdpa"])
def test_bf16_stays_within_its_rounding_of_fp32(backend: Backend) -> None:
    run_ranks(1, check_bf16_rounding, replace(CONFIG, attention_backend=backend))


def check_bf16_rounding(config: ModelConfig) -> None:
    want_loss, want = gradients(config, GPU, torch.float32, "none")
    loss, grads = gradients(config, GPU, torch.bfloat16, "none")
    torch.testing.assert_close(loss, want_loss, rtol=1e-2, atol=0)
    for name, grad in grads.items():
        error = (grad.float() - want[name]).norm() / want[name].norm()
        assert error < 0.1, f"{name}: {error}"


def gradients(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, recompute: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of one microbatch and the gradient of every parameter, on the CPU."""
    placement = Placement(build_groups(ParallelDims()).tensor, dtype=dtype)
    model = build_model(config, placement, device=device, recompute=recompute)
    init_parameters(model.named_parameters(), config, placement, seed=1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, config.seq_length), generator=generator)
    targets = tokens.roll(-1, dims=1)
    inputs = ModelInputs(
        tokens=tokens.to(device),
        targets=targets.to(device),
        loss_weights=torch.ones(tokens.shape, device=device) / tokens.numel(),
        samples=torch.tensor([3, 8], device=device),
    )
    loss = model(inputs, RngStreams(5, inputs.samples))
    loss.backward()
    grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach().cpu(), grads


@pytest.mark.parametrize("head_size", [64, 80, 96, 128])
@pytest.mark.parametrize("num_queries", [128, 203])
def test_backends_agree_in_bf16(head_size: int, num_queries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(2, 4, num_queries, head_size, generator=generator) for _ in range(4)
    )
    bias = AttentionBias(slopes=alibi_slopes(4))
    want = run_attention(q.double(), k.double(), v.double(), grad.double(), bias, "explicit", CPU)
    for backend in ("explicit", "sdpa"):
        got = run_attention(q, k, v, grad, bias, backend, GPU, dtype=torch.bfloat16)
        for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
            error = (a.double() - b).norm() / b.norm()
            assert error < 0.02, f"{backend} {name}: {error}"


def run_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    bias: AttentionBias,
    backend: Any,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Output and the three gradients, on the CPU."""
    leaves = [x.to(device, dtype or x.dtype).requires_grad_() for x in (q, k, v)]
    assert bias.slopes is not None
    bias = replace(bias, slopes=bias.slopes.to(device))
    out = attention(*leaves, bias, backend=backend)
    grads = torch.autograd.grad(out, leaves, grad.to(out))
    return [x.detach().cpu() for x in (out, *grads)]


def test_dropout_drops_the_same_elements_as_on_the_cpu() -> None:
    streams = RngStreams(7, torch.arange(3))
    keys = streams.keys(1, axes=[range(5)])
    x = torch.ones(3, 5, 70)
    got = dropout(x.to(GPU), 0.3, keys.to(GPU))
    assert torch.equal(got.cpu(), dropout(x, 0.3, keys))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_loss_of_one() -> None:
    [want] = run_ranks(1, loss_on_gpus, 1)
    for loss in run_ranks(2, loss_on_gpus, 2):
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)


def loss_on_gpus(tensor: int) -> Tensor:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    device = torch.device("cuda", group.rank())
    placement = Placement(group, dtype=torch.float64)
    model = build_model(CONFIG, placement, device=device)
    init_parameters(model.named_parameters(), CONFIG, placement, seed=1)
    tokens = torch.arange(CONFIG.seq_length, device=device).unsqueeze(0)
    weights = torch.ones(tokens.shape, device=device)
    with torch.no_grad():
        loss: Tensor = model(ModelInputs(tokens, tokens, weights, tokens[:, 0]))
    return loss.cpu()
