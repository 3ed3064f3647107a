"""A layer communicates exactly what theory says, counted on the way to the process group.

One forward and backward pass of models with one and with three layers: the difference is that of
two layers, without embedding, head and step. Of n elements, over t ranks, a ring moves

    all-reduce      2 (t - 1) / t n
    reduce-scatter    (t - 1) / t n
    all-gather        (t - 1) / t n
"""

from collections import Counter
from fractions import Fraction
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config import ModelConfig, Recompute
from megatron.model.init import build_model, init_parameters
from megatron.model.inputs import ModelInputs
from megatron.model.placement import Placement
from mpu import (
    ColumnParallelLinear,
    ParallelDims,
    RngStreams,
    build_groups,
    vocab_parallel_linear_cross_entropy,
)
from mpu.collectives import Pending
from tests.distributed import run_ranks
from tests.figures import Figure
from tests.megatron.model.parallel import ONE_RANK, PARALLEL, Layout

BATCH, SEQ, HIDDEN = 2, 32, 48
WHOLE = BATCH * SEQ * HIDDEN

# The position, among an operation's arguments, of the tensor that has all ranks' elements.
OPERATIONS = {"allreduce_": 0, "_allgather_base_": 0, "_reduce_scatter_base_": 1}
ROUNDS = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1}

# Forward and backward; and, where all is recomputed, forward once more.
PASSES: dict[Recompute, int] = {"none": 2, "selective": 2, "full": 3}


class Communication(TorchDispatchMode):
    """Counts collectives by operation and elements of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int]] = Counter()

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            whole = args[OPERATIONS[name]]
            tensors = [whole] if isinstance(whole, Tensor) else whole
            self.calls[name, sum(tensor.numel() for tensor in tensors)] += 1
        return func(*args, **(kwargs or {}))


def count_model(num_layers: int, layout: Layout, recompute: Recompute) -> Counter[tuple[str, int]]:
    """What one rank calls in one microbatch."""
    config = ModelConfig(
        num_layers=num_layers,
        hidden_size=HIDDEN,
        num_heads=8,
        vocab_size=509,
        seq_length=SEQ,
        hidden_dropout=0.1,
    )
    group = build_groups(ParallelDims(tensor=layout.tensor)).tensor
    placement = Placement(group, layout.sequence)
    model = build_model(
        config, placement, device=torch.device("cpu"), backend="blocked", recompute=recompute
    )
    init_parameters(model.named_parameters(), config, placement, seed=1)
    tokens = torch.randint(0, 509, (BATCH, SEQ))
    weights = torch.ones(BATCH, SEQ)
    inputs = ModelInputs(tokens, tokens, weights, torch.arange(BATCH))
    with Communication() as communication:
        model(inputs, RngStreams(1, inputs.samples)).backward()
    return communication.calls


def count_two_layers(layout: Layout) -> dict[Recompute, Counter[tuple[str, int]]]:
    """What one rank calls for two layers, with every kind of recomputation."""
    counts = {}
    for recompute in PASSES:
        one, three = (count_model(num_layers, layout, recompute) for num_layers in (1, 3))
        three.subtract(one)
        counts[recompute] = Counter({call: count for call, count in three.items() if count != 0})
    return counts


def ring_volume(calls: Counter[tuple[str, int]], tensor: int) -> Fraction:
    """Elements that each rank sends."""
    return sum(
        (
            count * ROUNDS[name] * n * Fraction(tensor - 1, tensor)
            for (name, n), count in calls.items()
        ),
        start=Fraction(),
    )


@pytest.mark.parametrize("layout", PARALLEL, ids=str)
def test_communication(layout: Layout, figure: Figure) -> None:
    pair = ("_reduce_scatter_base_", "_allgather_base_")
    operations = pair if layout.sequence else ("allreduce_",)
    t = layout.tensor
    for recompute, calls in run_ranks(t, count_two_layers, layout)[0].items():
        passes = PASSES[recompute]
        assert calls == {(name, WHOLE): 2 * 2 * passes for name in operations}, recompute
        volume = ring_volume(calls, t) / 2
        assert volume == 2 * passes * Fraction(2 * (t - 1), t) * WHOLE, recompute
        figure(
            f"communication of a layer: {layout}, recompute {recompute}",
            calls=sum(calls.values()) / 2,
            hidden_states_sent=float(volume / WHOLE),
        )


def test_one_rank_does_not_communicate() -> None:
    assert run_ranks(1, count_model, 2, ONE_RANK, "none") == [Counter()]


@pytest.mark.parametrize(("chunk_tokens", "chunks"), [(16, 1), (4, 4), (5, 4)])
def test_loss_gathers_three_numbers_a_token_in_each_chunk(chunk_tokens: int, chunks: int) -> None:
    (calls, _) = run_ranks(2, count_loss, chunk_tokens)
    assert sum(calls.values()) == chunks
    assert {name for name, _ in calls} == {"_allgather_base_"}
    assert sum(n * count for (_, n), count in calls.items()) == 2 * 3 * 16


def count_loss(chunk_tokens: int) -> Counter[tuple[str, int]]:
    group = build_groups(ParallelDims(tensor=2)).tensor
    hidden = torch.randn(16, 8, requires_grad=True)
    weight = torch.randn(32, 8, requires_grad=True)
    targets = torch.randint(0, 64, (16,))
    with Communication() as communication:
        vocab_parallel_linear_cross_entropy(
            hidden, weight, targets, torch.ones(16), group=group, chunk_tokens=chunk_tokens
        ).backward()
    return communication.calls


class Order(TorchDispatchMode):
    """Notes the names of operations in the order in which they begin."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sequence", [False, True])
def test_input_gradient_is_on_its_way_during_the_weight_gradient(sequence: bool) -> None:
    run_ranks(2, check_overlap, sequence)


def check_overlap(sequence: bool) -> None:
    group = build_groups(ParallelDims(tensor=2)).tensor
    layer = ColumnParallelLinear(8, 6, group=group, sequence_parallel=sequence, bias=False)
    y = layer(torch.randn(1, 4, 8, requires_grad=True))
    plain_wait = Pending.wait
    with Order() as order, pytest.MonkeyPatch.context() as patch:

        def noted_wait(pending: Pending) -> Tensor:
            order.names.append("wait")
            return plain_wait(pending)

        patch.setattr(Pending, "wait", noted_wait)
        y.sum().backward()
    reduction = "_reduce_scatter_base_" if sequence else "allreduce_"
    steps = [name for name in order.names if name in ("mm", reduction, "wait")]
    assert steps[-3:] == [reduction, "mm", "wait"]
