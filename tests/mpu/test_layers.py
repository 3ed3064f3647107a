"""Parallel layers against torch's own on one rank: outputs and all gradients, in float64.

The tolerance of 1e-12 is for sums in another order.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mpu import (
    ColumnParallelLinear,
    ParallelDims,
    RowParallelLinear,
    ShardSpec,
    VocabParallelEmbedding,
    build_groups,
    shard_spec,
)
from tests.distributed import run_ranks
from tests.shards import cut, join

BATCH, SEQ, IN, OUT = 2, 8, 24, 16
X_SHAPE = (BATCH, SEQ, IN)

COLUMN_CASES: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"gather_output": True},
    {"skip_bias_add": True},
    {"num_blocks": 2},
    {"sequence_parallel": True},
    {"sequence_parallel": True, "num_blocks": 2, "bias": False},
]

ROW_CASES: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"input_is_parallel": False},
    {"skip_bias_add": True},
    {"sequence_parallel": True},
    {"sequence_parallel": True, "input_is_parallel": False},
]

EMBEDDING_CASES: list[dict[str, Any]] = [
    {"num_embeddings": 512},
    {"num_embeddings": 509},
    {"num_embeddings": 509, "sequence_parallel": True},
    # Over 4 ranks, the last two hold nothing but padding.
    {"num_embeddings": 509, "padding_multiple": 256},
    {"num_embeddings": 509, "padding_multiple": 256, "sequence_parallel": True},
]


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_column_parallel_linear_matches_one_rank(tensor: int) -> None:
    run_ranks(tensor, check_column, tensor)


def check_column(tensor: int) -> None:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    for options in COLUMN_CASES:
        layer = ColumnParallelLinear(IN, OUT, group=group, dtype=torch.float64, **options)
        outputs = ShardSpec((BATCH, SEQ, OUT), dim=2, blocks=options.get("num_blocks", 1))
        check_linear(
            layer,
            group,
            x_spec=sequence_part(X_SHAPE, options),
            y_spec=ShardSpec(outputs.shape) if options.get("gather_output") else outputs,
            case=str(options),
        )


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_row_parallel_linear_matches_one_rank(tensor: int) -> None:
    run_ranks(tensor, check_row, tensor)


def check_row(tensor: int) -> None:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    for options in ROW_CASES:
        layer = RowParallelLinear(IN, OUT, group=group, dtype=torch.float64, **options)
        is_cut = options.get("input_is_parallel", True)
        check_linear(
            layer,
            group,
            x_spec=ShardSpec(X_SHAPE, dim=2 if is_cut else None),
            y_spec=sequence_part((BATCH, SEQ, OUT), options),
            case=str(options),
        )


def sequence_part(shape: tuple[int, ...], options: dict[str, Any]) -> ShardSpec:
    return ShardSpec(shape, dim=1 if options.get("sequence_parallel") else None)


def check_linear(
    layer: ColumnParallelLinear | RowParallelLinear,
    group: ProcessGroup,
    *,
    x_spec: ShardSpec,
    y_spec: ShardSpec,
    case: str,
) -> None:
    """Compare with ``F.linear``; the specs say what a rank holds of input and output."""
    whole = {name: give_random(p, group) for name, p in layer.named_parameters()}
    x = torch.randn(x_spec.shape, dtype=torch.float64, requires_grad=True)
    y = F.linear(x, whole["weight"], None if layer.skip_bias_add else whole.get("bias"))
    grad = torch.randn_like(y)
    y.backward(grad)

    x_local = local(x.detach(), x_spec, group).requires_grad_()
    y_local = layer(x_local)
    y_local.backward(local(grad, y_spec, group))

    assert_close(y_local, local(y, y_spec, group), case)
    assert x.grad is not None
    assert_close(x_local.grad, local(x.grad, x_spec, group), f"{case}: input gradient")
    for name, parameter in layer.named_parameters():
        check_gradient(parameter, whole[name], group, f"{case}: gradient of {name}")


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_embedding_matches_one_rank(tensor: int) -> None:
    run_ranks(tensor, check_embedding, tensor)


def check_embedding(tensor: int) -> None:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    for options in EMBEDDING_CASES:
        layer = VocabParallelEmbedding(embedding_dim=6, group=group, dtype=torch.float64, **options)
        whole = give_random(layer.weight, group)
        ids = torch.randint(0, options["num_embeddings"], (BATCH, SEQ))
        ids[0, :2] = torch.tensor([0, options["num_embeddings"] - 1])
        y = F.embedding(ids, whole)
        grad = torch.randn_like(y)
        y.backward(grad)

        y_spec = sequence_part((BATCH, SEQ, 6), options)
        y_local = layer(ids)
        y_local.backward(local(grad, y_spec, group))
        assert torch.equal(y_local, local(y, y_spec, group)), f"{options}"
        check_gradient(layer.weight, whole, group, f"{options}: gradient")


def give_random(parameter: nn.Parameter, group: ProcessGroup) -> Tensor:
    """Give ``parameter`` its part of a random whole, and return the whole as a leaf."""
    spec = shard_spec(parameter)
    whole = torch.randn(spec.shape, dtype=parameter.dtype)
    with torch.no_grad():
        parameter.copy_(local(whole, spec, group))
    return whole.requires_grad_()


def local(whole: Tensor, spec: ShardSpec, group: ProcessGroup) -> Tensor:
    return cut(whole.detach(), spec, group.rank(), group.size())


def check_gradient(parameter: nn.Parameter, whole: Tensor, group: ProcessGroup, case: str) -> None:
    """Compare the gradient of all that this rank holds, also of padding, which has none."""
    if whole.grad is None:
        assert parameter.grad is None, case
        return
    spec = shard_spec(parameter)
    assert parameter.grad is not None, case
    if spec.sum_gradient:
        dist.all_reduce(parameter.grad, group=group)
    assert_close(parameter.grad, local(whole.grad, spec, group), case)


def assert_close(got: Tensor | None, want: Tensor, case: str, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        got, want, rtol=tolerance, atol=tolerance, msg=lambda text: f"{case}: {text}"
    )


def test_bf16_layers_are_within_rounding_of_float64() -> None:
    run_ranks(2, check_bf16)


def check_bf16() -> None:
    group = build_groups(ParallelDims(tensor=2)).tensor
    layer = RowParallelLinear(IN, OUT, group=group, dtype=torch.bfloat16)
    whole = {name: give_random(p, group) for name, p in layer.named_parameters()}
    x = torch.randn(X_SHAPE, dtype=torch.bfloat16)
    want = F.linear(x.double(), whole["weight"].double(), whole["bias"].double())
    got = layer(local(x, ShardSpec(X_SHAPE, dim=2), group))
    # Two partial sums, their sum and the bias: each rounds by at most 2^-9 of what it holds.
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).abs().max() <= 4 * 2**-9 * want.abs().max()


def test_initial_weights_are_the_same_at_every_size() -> None:
    whole = initial_weights(1)
    for tensor in (2, 4):
        for name, weight in initial_weights(tensor).items():
            assert torch.equal(weight, whole[name]), name
    for name, weight in whole.items():
        fan_in = 6 if name == "embedding.weight" else IN
        assert weight.std() * (3 * fan_in) ** 0.5 == pytest.approx(1, rel=0.1), name


def initial_weights(tensor: int) -> dict[str, Tensor]:
    ranks = run_ranks(tensor, local_initial_weights, tensor)
    return {
        name: join([weights[name][0] for weights in ranks], spec)
        for name, (_, spec) in ranks[0].items()
    }


def local_initial_weights(tensor: int) -> dict[str, tuple[Tensor, ShardSpec]]:
    group = build_groups(ParallelDims(tensor=tensor)).tensor
    layers = nn.ModuleDict(
        {
            "column": ColumnParallelLinear(IN, OUT, group=group, num_blocks=2, bias=False),
            "row": RowParallelLinear(IN, OUT, group=group, bias=False),
            "embedding": VocabParallelEmbedding(509, 6, group=group),
        }
    )
    return {name: (p.detach(), shard_spec(p)) for name, p in layers.named_parameters()}


def test_wrong_sizes_and_ids_are_refused() -> None:
    run_ranks(2, check_refusals)


def check_refusals() -> None:
    group = build_groups(ParallelDims(tensor=2)).tensor
    with pytest.raises(ValueError, match=r"out_features \(7\) must be a multiple of 2 "):
        ColumnParallelLinear(4, 7, group=group)
    with pytest.raises(ValueError, match=r"out_features \(6\) must be a multiple of 4 "):
        ColumnParallelLinear(4, 6, group=group, num_blocks=2)
    with pytest.raises(ValueError, match=r"in_features \(7\) must be a multiple of 2 "):
        RowParallelLinear(7, 4, group=group)
    # 509 is a row of padding: it exists on the last rank, and is no token.
    embedding = VocabParallelEmbedding(509, 6, group=group)
    for wrong in (509, -1):
        with pytest.raises(ValueError, match=r"below the vocabulary size 509, got "):
            embedding(torch.tensor([[3, wrong]]))


def test_layers_can_be_made_without_memory() -> None:
    run_ranks(1, check_meta)


def check_meta() -> None:
    group = build_groups(ParallelDims()).tensor
    layer = ColumnParallelLinear(2**30, 2**20, group=group, device="meta")
    assert layer.weight.is_meta
    assert shard_spec(layer.weight) == ShardSpec((2**20, 2**30), dim=0)
