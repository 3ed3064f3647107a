"""Cross-entropy over logits that are cut over the vocabulary.

Per token, with logits z and target y, the loss is log(sum_v exp z_v) - z_y. Each rank of the tensor
group holds some v. It computes three numbers a token, the maximum m_r of its logits, the sum
s_r = sum_v exp(z_v - m_r), and z_y if it holds y, and one all-gather of these gives every rank

    m = max_r m_r        loss = log(sum_r s_r exp(m_r - m)) + (m - z_y)

Columns that pad the vocabulary take no part: their probability and gradient are exactly zero.
Probabilities are computed in float32, or float64 for float64 logits.

``vocab_parallel_linear_cross_entropy`` starts one step earlier, from the hidden states. It goes
over the tokens in chunks and computes the gradients of each chunk at once, while its logits are
there, so that the logits of a large vocabulary are never all in memory and never computed twice.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mpu.assertions import check_all
from mpu.collectives import all_gather
from mpu.products import add_product, computes_in_float32, main_grad

_CHUNK_BYTES = 2**26
"""Memory of the logits of one chunk on a CPU."""

_CHUNK_SHARE = 1 / 64
"""Share of a GPU's memory for the logits of one chunk: large products fill it better."""


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    group: ProcessGroup,
    vocab_size: int | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Loss of each token: ``(*, vocab / tensor)``, ``(*)`` -> ``(*)``.

    Every rank of ``group`` calls it with the same targets, and gets the same losses.

    Args:
        logits: this rank's columns of the logits.
        targets: token ids below ``vocab_size``, or ``ignore_index``.
        vocab_size: number of tokens, if the last columns are padding; default: all columns.
        ignore_index: what stands for a target that does not count, whose loss and gradient are
            zero; -100 is what ``torch.nn.functional.cross_entropy`` takes. Default: every target
            has to be a token, so that none is left out by mistake.

    Raises:
        ValueError: for any other target (on a GPU, a device-side assertion).
    """
    columns = _Columns.of_rank(group, logits.size(-1), vocab_size)
    ignored = _check_targets(targets, columns, ignore_index)
    if ignored is None:
        return _CrossEntropy.apply(logits, targets, group, columns)
    losses: Tensor = _CrossEntropy.apply(logits, targets.masked_fill(ignored, 0), group, columns)
    return losses.masked_fill(ignored, 0)


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    *,
    group: ProcessGroup,
    vocab_size: int | None = None,
    ignore_index: int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Weighted sum of the tokens' losses, for logits ``hidden @ weight.T``; a scalar.

    Every rank of ``group`` calls it with the same hidden states, and gets the same sum. The
    gradient of ``hidden`` is this rank's part: the sum over the group is that of the whole head,
    which ``copy_to_region`` or ``gather_from_sequence`` in front of this function takes care of.

    Args:
        hidden: ``(*, hidden)``.
        weight: this rank's rows of the output layer, ``(vocab / tensor, hidden)``.
        targets: token ids below ``vocab_size``, or ``ignore_index``, ``(*)``.
        token_weights: weight of each token's loss in the sum, ``(*)``; no gradient.
        vocab_size: number of tokens, if the last rows are padding; default: all rows.
        ignore_index: what stands for a target that does not count, whatever its weight; see
            ``vocab_parallel_cross_entropy``.
        chunk_tokens: tokens whose logits are in memory at once; default: as many as fit in 64 MiB,
            or in a 64th of the memory of a GPU.

    Raises:
        ValueError: for any other target (on a GPU, a device-side assertion).
    """
    columns = _Columns.of_rank(group, weight.size(0), vocab_size)
    ignored = _check_targets(targets, columns, ignore_index)
    if ignored is not None:
        targets = targets.masked_fill(ignored, 0)
        token_weights = token_weights.masked_fill(ignored, 0)
    chunk = chunk_tokens or tokens_at_once(weight.size(0), _gpu_memory(weight.device))
    return _LinearCrossEntropy.apply(
        hidden.reshape(-1, hidden.size(-1)),
        weight,
        targets.reshape(-1),
        token_weights.reshape(-1),
        group,
        columns,
        chunk,
    )


def tokens_at_once(rows: int, gpu_memory: float | None) -> int:
    """Tokens whose logits are in memory at once, where nobody says how many.

    Args:
        rows: of the vocabulary on this rank.
        gpu_memory: bytes of the GPU; None on a CPU.
    """
    room = _CHUNK_BYTES if gpu_memory is None else int(gpu_memory * _CHUNK_SHARE)
    return max(1, room // (4 * rows))


def _gpu_memory(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return float(torch.cuda.get_device_properties(device).total_memory)


@dataclass(frozen=True)
class _Columns:
    """The part of the vocabulary of ``whole`` tokens that this rank holds: ``count`` from ``first``
    on."""

    first: int
    count: int
    whole: int

    @classmethod
    def of_rank(cls, group: ProcessGroup, width: int, vocab_size: int | None) -> "_Columns":
        first = group.rank() * width
        whole = width * group.size() if vocab_size is None else vocab_size
        return cls(first, max(0, min(first + width, whole) - first), whole)


def _check_targets(targets: Tensor, columns: _Columns, ignore_index: int | None) -> Tensor | None:
    """Refuse targets that are no tokens; which of them are to be ignored, if any may be."""
    inside = (targets >= 0) & (targets < columns.whole)
    ignored = None if ignore_index is None else targets == ignore_index
    allowed = inside if ignored is None else inside | ignored
    check_all(
        allowed,
        lambda: (
            f"targets must be at least 0 and below the vocabulary size {columns.whole}"
            f"{'' if ignore_index is None else f', or ignore_index {ignore_index}'}, "
            f"got {targets[~allowed][0].item()}"
        ),
    )
    return ignored


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, group: ProcessGroup, columns: _Columns
    ) -> Tensor:
        # A copy, because the probabilities are computed in its place.
        precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
        probabilities = logits.to(precise, copy=True)
        loss, factor, target = _exponentials_(probabilities, targets, group, columns)
        probabilities.mul_(factor.unsqueeze(-1))
        ctx.save_for_backward(probabilities, target.local, target.here)
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, local, here = ctx.saved_tensors
        grad_logits = probabilities * grad.unsqueeze(-1)
        _Target(local, here).subtract_from(grad_logits, grad)
        return grad_logits.to(ctx.dtype), None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        group: ProcessGroup,
        columns: _Columns,
        chunk: int,
    ) -> Tensor:
        precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=precise, device=hidden.device)
        of_hidden, of_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if of_weight else None
        # Where products are computed in float32, the weight is converted once for all chunks.
        factor = weight.float() if computes_in_float32(hidden) else weight
        # All chunks use the same memory: on a CPU, new pages cost as much time as a product.
        room = factor.new_empty(min(chunk, hidden.size(0)), weight.size(0))
        # Of one dtype they are one, and a copy from one to the other does nothing.
        precise_room = room if room.dtype == precise else torch.empty_like(room, dtype=precise)
        for start in range(0, hidden.size(0), chunk):
            part = slice(start, start + chunk)
            states = hidden[part].to(factor.dtype)
            logits = torch.mm(states, factor.t(), out=room[: states.size(0)])
            precise_logits = precise_room[: states.size(0)].copy_(logits)
            loss, to_probabilities, target = _exponentials_(
                precise_logits, targets[part], group, columns
            )
            weights = token_weights[part]
            total += (loss * weights).sum()
            if of_hidden or of_weight:
                precise_logits.mul_((to_probabilities * weights).unsqueeze(-1))
                target.subtract_from(precise_logits, weights)
                grad_logits = logits.copy_(precise_logits)
                if grad_hidden is not None:
                    grad_hidden[part] = grad_logits @ factor
                if grad_weight is not None:
                    add_product(grad_weight, grad_logits, states)
        if of_hidden or of_weight:
            ctx.save_for_backward(grad_hidden, grad_weight, weight)
        return total

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        grad_hidden, grad_weight, weight = ctx.saved_tensors
        # In place: a copy of the weight gradient of a large vocabulary would cost as much memory
        # as the chunks save. The price is that this can run only once.
        if grad_hidden is not None:
            grad_hidden.mul_(grad)
        if grad_weight is None:
            return grad_hidden, None, None, None, None, None, None
        buffer = main_grad(weight)
        if buffer is None:
            grad_weight = grad_weight.mul_(grad).to(weight.dtype)
            return grad_hidden, grad_weight, None, None, None, None, None
        buffer.addcmul_(grad_weight, grad.to(buffer.dtype))
        return grad_hidden, None, None, None, None, None, None


@dataclass(frozen=True)
class _Target:
    """Where the logits of the tokens' targets are.

    Attributes:
        local: this rank's column of each token's target, 0 if it is on another rank.
        here: whether this rank holds it.
    """

    local: Tensor
    here: Tensor

    @classmethod
    def among(cls, columns: _Columns, targets: Tensor) -> "_Target":
        local = targets - columns.first
        here = (local >= 0) & (local < columns.count)
        return cls(local.masked_fill(~here, 0), here)

    def pick(self, logits: Tensor) -> Tensor:
        """The logits of the targets, zero for those on other ranks."""
        picked = logits.gather(-1, self.local.unsqueeze(-1)).squeeze(-1)
        return picked.masked_fill(~self.here, 0)

    def subtract_from(self, logits: Tensor, values: Tensor) -> None:
        """Subtract a value for each token, in place."""
        own = -values.to(logits.dtype).masked_fill(~self.here, 0)
        logits.scatter_add_(-1, self.local.unsqueeze(-1), own.unsqueeze(-1))


def _exponentials_(
    logits: Tensor, targets: Tensor, group: ProcessGroup, columns: _Columns
) -> tuple[Tensor, Tensor, _Target]:
    """Turn this rank's ``logits`` into exponentials, in place.

    Returns:
        The loss of each token, what makes its exponentials probabilities, and its target.
    """
    logits[..., columns.count :] = torch.finfo(logits.dtype).min
    target = _Target.among(columns, targets)
    target_logit = target.pick(logits)
    own_max = logits.amax(dim=-1)
    own_sum = logits.sub_(own_max.unsqueeze(-1)).exp_().sum(dim=-1)

    ranks = torch.stack([own_max, own_sum, target_logit]).unsqueeze(0)
    maxima, sums, target_logits = all_gather(ranks, group, dim=0).unbind(dim=1)
    maximum = maxima.amax(dim=0)
    log_sum = (sums * (maxima - maximum).exp()).sum(dim=0).log()
    # The difference of two logits first: a large one would swallow the logarithm.
    loss = log_sum + (maximum - target_logits.sum(dim=0))
    return loss, (own_max - maximum - log_sum).exp(), target
