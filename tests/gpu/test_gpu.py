"""What needs a GPU: the numbers of the CPU again, and bf16 within its rounding of fp32."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.config import Config, ModelConfig, TrainConfig
from megatron.model.alibi import alibi_slopes
from megatron.model.attention import (
    AttentionBias,
    AttentionDropout,
    Backend,
    attention,
    candidates,
    runs_on,
)
from megatron.model.init import build_model, init_parameters
from megatron.model.inputs import ModelInputs
from megatron.model.placement import Placement
from megatron.tuning.attention import (
    choose_backend,
    measure,
    time_on_gpu,
)
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
BACKENDS: list[Backend] = ["explicit", "blocked", "sdpa", "flex", "flash"]
ON_GPU = [backend for backend in BACKENDS if runs_on(backend, GPU)]


@pytest.mark.parametrize("backend", ["explicit", "blocked", "sdpa"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_on_the_gpu_equals_one_on_the_cpu(backend: Backend, recompute: Any) -> None:
    run_ranks(1, check_step_equals_cpu, backend, recompute)


def check_step_equals_cpu(backend: Backend, recompute: Any) -> None:
    want_loss, want = gradients(CONFIG, CPU, torch.float64, "none", "explicit")
    loss, grads = gradients(CONFIG, GPU, torch.float64, recompute, backend)
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=0)
    for name, grad in grads.items():
        error = (grad - want[name]).abs().max() / want[name].abs().max()
        assert error < 1e-11, f"{name}: {error}"


@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_bf16_stays_within_its_rounding_of_fp32(backend: Backend, recompute: Any) -> None:
    run_ranks(1, check_bf16_rounding, backend, recompute)


def check_bf16_rounding(backend: Backend, recompute: Any) -> None:
    want_loss, want = gradients(CONFIG, GPU, torch.float32, "none", "explicit")
    loss, grads = gradients(CONFIG, GPU, torch.bfloat16, recompute, backend)
    torch.testing.assert_close(loss, want_loss, rtol=1e-2, atol=0)
    for name, grad in grads.items():
        error = (grad.float() - want[name]).norm() / want[name].norm()
        assert error < 0.1, f"{name}: {error}"


def gradients(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    recompute: Any,
    backend: Backend,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of one microbatch and the gradient of every parameter, on the CPU."""
    placement = Placement(build_groups(ParallelDims()).tensor, dtype=dtype)
    model = build_model(config, placement, device=device, backend=backend, recompute=recompute)
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


@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("precision", ["exact", "bloom_bf16"])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128])
@pytest.mark.parametrize("seq", [128, 203])
def test_backends_agree_in_bf16(
    backend: Backend, precision: Any, with_documents: bool, head_size: int, seq: int
) -> None:
    if backend == "flash" and (with_documents or precision == "bloom_bf16"):
        pytest.skip("flash does not do this")
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 4, seq, head_size, generator=generator) for _ in range(4))
    documents = (torch.arange(seq) >= seq // 3).repeat(2, 1).long() if with_documents else None
    # The heads of one rank of two.
    bias = AttentionBias(documents, alibi_slopes(8)[4:], precision)
    want = run_attention(q.double(), k.double(), v.double(), grad.double(), bias, "explicit", CPU)
    got = run_attention(q, k, v, grad, bias, backend, GPU, dtype=torch.bfloat16)
    # Scores of these two are rounded with their bias in them, as those of the published models.
    rounded = precision == "bloom_bf16" and backend in ("explicit", "blocked")
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error < (0.2 if rounded else 0.02), f"{name}: {error}"


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_of_attention_is_the_same_in_both_backends(p: float) -> None:
    streams = RngStreams(7, torch.arange(2, device=GPU))
    random = AttentionDropout(p, streams.keys(1, axes=[range(4), range(203)]))
    q, k, v = (torch.randn(2, 4, 203, 64, dtype=torch.float64, device=GPU) for _ in range(3))
    bias = AttentionBias(slopes=alibi_slopes(4).to(GPU))
    explicit, blocked = (
        attention(q, k, v, bias, backend=backend, attention_dropout=random)
        for backend in ("explicit", "blocked")
    )
    torch.testing.assert_close(explicit, blocked, rtol=0, atol=1e-12)


def test_auto_takes_the_fastest_of_what_it_measures(tmp_path: Path) -> None:
    config = Config(
        folder=tmp_path,
        model=CONFIG,
        train=TrainConfig(samples=4, global_batch_size=4, micro_batch_size=4, dtype="bf16"),
    )
    able = candidates(config, GPU)
    found = measure(config, GPU, able, time_on_gpu)
    assert set(found) == set(able)
    assert min(found.values()) > 0
    assert choose_backend(config, GPU, {}, group=None).backend in able


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
    query, key, value = leaves = [
        x.to(device, dtype or x.dtype).requires_grad_() for x in (q, k, v)
    ]
    assert bias.slopes is not None
    documents = None if bias.documents is None else bias.documents.to(device)
    bias = replace(bias, slopes=bias.slopes.to(device), documents=documents)
    out = attention(query, key, value, bias, backend=backend)
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
    model = build_model(CONFIG, placement, device=device, backend="sdpa")
    init_parameters(model.named_parameters(), CONFIG, placement, seed=1)
    tokens = torch.arange(CONFIG.seq_length, device=device).unsqueeze(0)
    weights = torch.ones(tokens.shape, device=device)
    with torch.no_grad():
        loss: Tensor = model(ModelInputs(tokens, tokens, weights, tokens[:, 0]))
    return loss.cpu()
