"""The fused head needs a fraction of the memory of plain logits, measured by the kernel."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpu import ParallelDims, build_groups, vocab_parallel_linear_cross_entropy
from tests.distributed import run_ranks
from tests.figures import Figure

VOCAB, TOKENS, HIDDEN = 250_880, 1024, 256
MIB = 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_head_memory(figure: Figure) -> None:
    plain_loss, plain_bytes = run_ranks(1, measure, False)[0]
    fused_loss, fused_bytes = run_ranks(1, measure, True)[0]
    figure("head memory", plain_mib=plain_bytes / MIB, fused_mib=fused_bytes / MIB)
    assert fused_loss == pytest.approx(plain_loss, rel=1e-5)
    assert fused_bytes <= 0.4 * plain_bytes


def measure(fused: bool) -> tuple[float, int]:
    """Loss, and bytes above inputs and weights at the peak of forward and backward."""
    group = build_groups(ParallelDims()).tensor
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    weight = torch.empty(VOCAB, HIDDEN).normal_(std=0.02).requires_grad_()
    targets = torch.randint(0, VOCAB, (TOKENS,))
    weights = torch.full((TOKENS,), 1 / TOKENS)
    # What the libraries allocate once belongs to neither form.
    plain_loss(hidden[:8], weight[:64], targets[:8] % 64).backward()
    hidden.grad = weight.grad = None

    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    if fused:
        loss = vocab_parallel_linear_cross_entropy(hidden, weight, targets, weights, group=group)
    else:
        loss = plain_loss(hidden, weight, targets)
    loss.backward()
    assert weight.grad is not None
    return loss.item(), resident("VmHWM") - before


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def resident(name: str) -> int:
    """A size of this process, in bytes: ``VmRSS`` now, ``VmHWM`` at its peak since the reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")
