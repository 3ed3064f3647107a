"""Cross-entropy over cut logits against torch's own over whole ones, in float64."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from mpu import (
    ParallelDims,
    build_groups,
    copy_to_region,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from tests.distributed import run_ranks

TOKENS, HIDDEN = 15, 12

# Vocabulary, and rows on each rank over 1, 2 and 4 ranks: even; padded; padding alone on two ranks.
VOCABULARIES = [
    (512, {1: 512, 2: 256, 4: 128}),
    (509, {1: 512, 2: 256, 4: 128}),
    (509, {1: 1024, 2: 512, 4: 256}),
]


@dataclass
class Head:
    """Hidden states, whole padded weights and targets, and the gradients that torch computes."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    token_weights: Tensor

    @classmethod
    def random(cls, vocab_size: int, rows: int) -> "Head":
        # What a row of padding holds must not matter.
        weight = torch.full((rows, HIDDEN), 1e3, dtype=torch.float64)
        weight[:vocab_size] = torch.randn(vocab_size, HIDDEN, dtype=torch.float64)
        targets = torch.randint(0, vocab_size, (3, TOKENS // 3))
        targets[0, :2] = torch.tensor([0, vocab_size - 1])
        token_weights = torch.rand(3, TOKENS // 3, dtype=torch.float64)
        token_weights[1] = 0
        hidden = torch.randn(3, TOKENS // 3, HIDDEN, dtype=torch.float64)
        return cls(hidden, weight, targets, token_weights)

    def solve(self, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each token, and the gradients of their weighted sum."""
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        logits = F.linear(hidden, weight[:vocab_size])
        losses = F.cross_entropy(logits.flatten(0, 1), self.targets.flatten(), reduction="none")
        losses = losses.view_as(self.targets)
        loss = (losses * self.token_weights).sum()
        grad_hidden, grad_weight = torch.autograd.grad(loss, [hidden, weight])
        return losses.detach(), grad_hidden, grad_weight


def rows_of(group: ProcessGroup, whole: Tensor) -> Tensor:
    return whole.chunk(group.size())[group.rank()].clone().requires_grad_()


def assert_close(got: Tensor | None, want: Tensor, case: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        got, want, rtol=tolerance, atol=tolerance, msg=lambda text: f"{case}: {text}"
    )


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_cross_entropy_matches_one_rank(tensor: int) -> None:
    run_ranks(tensor, check_cross_entropy, tensor)


def check_cross_entropy(tensor: int) -> None:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    for vocab_size, rows in VOCABULARIES:
        case = (vocab_size, rows[tensor])
        head = Head.random(vocab_size, rows[tensor] * tensor)
        want, want_hidden, want_weight = head.solve(vocab_size)
        hidden, weight = head.hidden.clone().requires_grad_(), rows_of(group, head.weight)
        logits = F.linear(copy_to_region(hidden, group), weight)
        before = logits.detach().clone()
        losses = vocab_parallel_cross_entropy(
            logits, head.targets, group=group, vocab_size=vocab_size
        )
        (losses * head.token_weights).sum().backward()
        assert torch.equal(logits, before), "the logits were changed"
        assert_close(losses, want, case)
        assert_close(hidden.grad, want_hidden, case)
        assert_close(weight.grad, want_weight.chunk(tensor)[group.rank()], case)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_fused_cross_entropy_matches_one_rank(tensor: int) -> None:
    run_ranks(tensor, check_fused_cross_entropy, tensor)


def check_fused_cross_entropy(tensor: int) -> None:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    for vocab_size, rows in VOCABULARIES:
        head = Head.random(vocab_size, rows[tensor] * tensor)
        want, want_hidden, want_weight = head.solve(vocab_size)
        for chunk_tokens in (1, 7, TOKENS, None):
            case = (vocab_size, rows[tensor], chunk_tokens)
            hidden, weight = head.hidden.clone().requires_grad_(), rows_of(group, head.weight)
            loss = fused(
                copy_to_region(hidden, group), weight, head, group, vocab_size, chunk_tokens
            )
            (3 * loss).backward()
            assert_close(loss, (want * head.token_weights).sum(), case)
            assert_close(hidden.grad, 3 * want_hidden, case)
            assert_close(weight.grad, 3 * want_weight.chunk(tensor)[group.rank()], case)


def fused(
    hidden: Tensor,
    weight: Tensor,
    head: Head,
    group: ProcessGroup,
    vocab_size: int,
    chunk_tokens: int | None = None,
) -> Tensor:
    return vocab_parallel_linear_cross_entropy(
        hidden,
        weight,
        head.targets,
        head.token_weights,
        group=group,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
    )


@pytest.mark.parametrize("tensor", [1, 4])
def test_padding_has_exactly_no_gradient(tensor: int) -> None:
    run_ranks(tensor, check_padding, tensor)


def check_padding(tensor: int) -> None:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    width = 1024 // tensor
    head = Head.random(509, 1024)
    count = min(max(509 - group.rank() * width, 0), width)

    logits = rows_of(group, head.weight).detach().new_full((3, TOKENS // 3, width), 1e30)
    logits[..., :count] = 0
    logits.requires_grad_()
    losses = vocab_parallel_cross_entropy(logits, head.targets, group=group, vocab_size=509)
    losses.sum().backward()
    assert_close(losses, torch.full_like(losses, math.log(509)), "equal logits")
    assert logits.grad is not None
    assert (logits.grad[..., count:] == 0).all()
    assert (logits.grad[..., :count] != 0).all()

    weight = rows_of(group, head.weight)
    fused(head.hidden, weight, head, group, 509).backward()
    assert weight.grad is not None
    assert (weight.grad[count:] == 0).all()


@pytest.mark.parametrize("tensor", [1, 4])
def test_extreme_logits_neither_overflow_nor_lose_the_loss(tensor: int) -> None:
    run_ranks(tensor, check_extreme_logits, tensor)


def check_extreme_logits(tensor: int) -> None:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    logits = torch.zeros(3, 8, dtype=torch.float32)
    logits[0, 7], logits[1] = 1e30, -1e30
    targets = torch.tensor([7, 2, 5])
    local = logits.chunk(tensor, dim=-1)[group.rank()]
    losses = vocab_parallel_cross_entropy(local, targets, group=group)
    assert losses.tolist() == pytest.approx([0, math.log(8), math.log(8)])
    far = vocab_parallel_cross_entropy(local[:1], targets[1:2], group=group)
    assert far.item() == pytest.approx(1e30)


def test_second_backward_is_an_error_and_no_wrong_number() -> None:
    run_ranks(1, check_second_backward)


def check_second_backward() -> None:
    group = build_groups(ParallelDims()).tensor
    head = Head.random(509, 512)
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_()
    loss = fused(hidden, weight, head, group, 509)
    loss.backward(torch.tensor(2.0, dtype=torch.float64), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fused_loss_is_the_same_without_gradients() -> None:
    run_ranks(2, check_without_gradients)


def check_without_gradients() -> None:
    group = build_groups(ParallelDims(tensor=2)).tensor
    head = Head.random(509, 512)
    weight = rows_of(group, head.weight)
    want = fused(head.hidden, weight, head, group, 509)
    with torch.no_grad():
        assert torch.equal(fused(head.hidden, weight, head, group, 509), want)


@pytest.mark.parametrize("tensor", [1, 2])
def test_bf16_is_within_rounding_of_float64(tensor: int) -> None:
    run_ranks(tensor, check_bf16, tensor)


def check_bf16(tensor: int) -> None:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    head = Head.random(509, 512)
    head.hidden, head.weight = (x.bfloat16().double() for x in (head.hidden, head.weight))
    want, want_hidden, want_weight = head.solve(509)
    hidden = head.hidden.bfloat16().requires_grad_()
    weight = rows_of(group, head.weight.bfloat16())
    loss = fused(copy_to_region(hidden, group), weight, head, group, 509, chunk_tokens=4)
    loss.backward()
    # Each logit is rounded by 2^-9 of its size, and a loss moves no more than its logits do.
    largest = F.linear(head.hidden, head.weight[:509]).abs().max()
    assert loss.dtype == torch.float32
    assert (loss - (want * head.token_weights).sum()).abs() <= 2 * 2**-9 * largest * TOKENS
    assert hidden.grad is not None
    assert weight.grad is not None
    assert_within(hidden.grad, want_hidden, 2 * 2**-9 * largest)
    assert_within(weight.grad, want_weight.chunk(tensor)[group.rank()], 2 * 2**-9 * largest)


def assert_within(got: Tensor, want: Tensor, bound: Tensor) -> None:
    """A probability moves by its logit's rounding, relatively; bf16 results round once more."""
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).abs().max() <= bound * want.abs().max()


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_ignored_targets_count_as_in_torch(tensor: int) -> None:
    run_ranks(tensor, check_ignored, tensor)


def check_ignored(tensor: int) -> None:
    """Values that are no token, among them the first behind the vocabulary, and one that is."""
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    for vocab_size, rows in VOCABULARIES:
        for ignore_index in (-100, -1, vocab_size, 2**40, 7):
            case = (vocab_size, rows[tensor], ignore_index)
            head = Head.random(vocab_size, rows[tensor] * tensor)
            head.targets[0, 1:4] = ignore_index
            want, want_hidden, want_weight = solve_ignoring(head, vocab_size, ignore_index)
            for loss_of in (separate_losses, fused_losses):
                hidden, weight = head.hidden.clone().requires_grad_(), rows_of(group, head.weight)
                loss = loss_of(
                    copy_to_region(hidden, group), weight, head, group, vocab_size, ignore_index
                )
                loss.backward()
                assert_close(loss, want, case)
                assert_close(hidden.grad, want_hidden, case)
                assert_close(weight.grad, want_weight.chunk(tensor)[group.rank()], case)
                assert hidden.grad is not None
                assert (hidden.grad[0, 1:4] == 0).all()


def solve_ignoring(head: Head, vocab_size: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    logits = F.linear(hidden, weight[:vocab_size]).flatten(0, 1)
    losses = F.cross_entropy(
        logits, head.targets.flatten(), reduction="none", ignore_index=ignore_index
    )
    loss = (losses * head.token_weights.flatten()).sum()
    grad_hidden, grad_weight = torch.autograd.grad(loss, [hidden, weight])
    return loss.detach(), grad_hidden, grad_weight


def separate_losses(
    hidden: Tensor, weight: Tensor, head: Head, group: ProcessGroup, vocab_size: int, ignored: int
) -> Tensor:
    losses = vocab_parallel_cross_entropy(
        F.linear(hidden, weight),
        head.targets,
        group=group,
        vocab_size=vocab_size,
        ignore_index=ignored,
    )
    assert (losses[head.targets == ignored] == 0).all()
    return (losses * head.token_weights).sum()


def fused_losses(
    hidden: Tensor, weight: Tensor, head: Head, group: ProcessGroup, vocab_size: int, ignored: int
) -> Tensor:
    return vocab_parallel_linear_cross_entropy(
        hidden,
        weight,
        head.targets,
        head.token_weights,
        group=group,
        vocab_size=vocab_size,
        ignore_index=ignored,
        chunk_tokens=4,
    )


@pytest.mark.parametrize("tensor", [1, 2])
def test_targets_outside_the_vocabulary_are_refused_on_every_rank(tensor: int) -> None:
    run_ranks(tensor, check_outside, tensor)


def check_outside(tensor: int) -> None:
    """Also where it would fall on padding, and where it is the usual value to be ignored."""
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    head = Head.random(509, 512)
    weight = rows_of(group, head.weight)
    for wrong in (-1, -100, 509, 511, 512, 2**40, -(2**63)):
        for ignored in (None, -2):
            head.targets[1, 2] = wrong
            message = f"targets must be at least 0 and below the vocabulary size 509.*got {wrong}$"
            with pytest.raises(ValueError, match=message):
                vocab_parallel_cross_entropy(
                    F.linear(head.hidden, weight),
                    head.targets,
                    group=group,
                    vocab_size=509,
                    ignore_index=ignored,
                )
            with pytest.raises(ValueError, match=message):
                vocab_parallel_linear_cross_entropy(
                    head.hidden,
                    weight,
                    head.targets,
                    head.token_weights,
                    group=group,
                    vocab_size=509,
                    ignore_index=ignored,
                )


def test_without_a_vocabulary_size_all_columns_are_tokens() -> None:
    run_ranks(2, check_all_columns)


def check_all_columns() -> None:
    group = build_groups(ParallelDims(tensor=2)).tensor
    logits = torch.zeros(1, 4)
    losses = vocab_parallel_cross_entropy(logits, torch.tensor([7]), group=group)
    assert losses.item() == pytest.approx(math.log(8))
    with pytest.raises(ValueError, match="below the vocabulary size 8, got 8"):
        vocab_parallel_cross_entropy(logits, torch.tensor([8]), group=group)
