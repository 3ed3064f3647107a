"""Linear layers and an embedding whose weights are cut over a tensor group.

    Y = X A,  A = [A_1 .. A_t] cut by columns:   each rank computes the slice  Y_i = X A_i
    Z = Y B,  B = [B_1; ..; B_t] cut by rows:    the ranks' products sum up,   Z = sum_i Y_i B_i

so that a column-parallel layer, anything element-wise, and a row-parallel layer need a single
all-reduce forward, after the second, and one backward, before the first. Weights are stored as
``(out, in)``, like torch's, which makes the cut dimension 0 for columns and 1 for rows.

With ``sequence_parallel``, the input of a column-parallel and the output of a row-parallel layer
are parts of the sequence: ``(batch, seq / tensor, hidden)``, and an all-gather with a
reduce-scatter takes the place of each all-reduce. With ``symmetric_memory`` these run beside the
products, on GPUs that reach each other's memory; see ``mpu.overlap``.

Layers start with weights that depend on torch's default seed and not on the size of the group: call
``torch.manual_seed`` alike on all ranks.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mpu.assertions import check_all
from mpu.collectives import Done, Pending, all_gather, start_all_reduce, start_reduce_scatter
from mpu.mappings import (
    SEQUENCE_DIM,
    gather_from_region,
    reduce_from_region,
    reduce_scatter_to_sequence,
    scatter_to_region,
)
from mpu.overlap import gather_linear, linear_reduce_scatter
from mpu.products import PLAIN, Products, bias_gradient, main_grad
from mpu.rng import init_normal
from mpu.sharding import ShardedModule, ShardSpec, set_shard_spec


class ColumnParallelLinear(ShardedModule):
    """``(*, in_features)`` -> ``(*, out_features / tensor)``: each rank computes some outputs.

    Args:
        group: the tensor group.
        gather_output: return all outputs on every rank, ``(*, out_features)``.
        sequence_parallel: take a part of the sequence, ``(batch, seq / tensor, in_features)``.
        symmetric_memory: gather the sequence beside the product.
        skip_bias_add: leave ``layer.bias`` to the caller, who fuses it with what follows.
        num_blocks: stacked matrices in the output, each of which is cut by itself.
        products: how matrices are multiplied; with symmetric memory, for the weight gradient only.

    Raises:
        ValueError: if the outputs of a block do not divide by the size of the group, or for
            symmetric memory without sequence parallelism.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: ProcessGroup,
        bias: bool = True,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        symmetric_memory: bool = False,
        skip_bias_add: bool = False,
        num_blocks: int = 1,
        products: Products = PLAIN,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_divides("out_features", out_features, num_blocks * group.size())
        self.group = group
        self.gather_output = gather_output
        self.sequence_parallel = sequence_parallel
        self.overlaps = _overlaps(symmetric_memory, sequence_parallel, group)
        self.skip_bias_add = skip_bias_add
        self.products = products
        weight = ShardSpec(shape=(out_features, in_features), dim=0, blocks=num_blocks)
        self.weight = _parameter(weight, group, dtype, device)
        _init_weight(self.weight, in_features, group)
        self.bias = None
        if bias:
            spec = ShardSpec(shape=(out_features,), dim=0, blocks=num_blocks)
            self.bias = _parameter(spec, group, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.skip_bias_add else self.bias
        if self.overlaps:
            y = gather_linear(x, self.weight, bias, self.group, self.products)
        else:
            group = self.group if self.group.size() > 1 else None
            y = _Linear.apply(x, self.weight, bias, group, self.sequence_parallel, self.products)
        return gather_from_region(y, self.group) if self.gather_output else y


class RowParallelLinear(ShardedModule):
    """``(*, in_features / tensor)`` -> ``(*, out_features)``: each rank computes a part of the sum.

    Args:
        group: the tensor group.
        input_is_parallel: the input is cut already; else it is whole, ``(*, in_features)``.
        sequence_parallel: return a part of the sequence, ``(batch, seq / tensor, out_features)``.
        symmetric_memory: sum up beside the product.
        skip_bias_add: leave ``layer.bias`` to the caller, who fuses it with what follows.
        products: how matrices are multiplied; with symmetric memory, for the weight gradient only.

    Raises:
        ValueError: if ``in_features`` does not divide by the size of the group, or for symmetric
            memory without sequence parallelism.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: ProcessGroup,
        bias: bool = True,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        symmetric_memory: bool = False,
        skip_bias_add: bool = False,
        products: Products = PLAIN,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_divides("in_features", in_features, group.size())
        self.group = group
        self.input_is_parallel = input_is_parallel
        self.sequence_parallel = sequence_parallel
        self.overlaps = _overlaps(symmetric_memory, sequence_parallel, group)
        self.skip_bias_add = skip_bias_add
        self.products = products
        weight = ShardSpec(shape=(out_features, in_features), dim=1)
        self.weight = _parameter(weight, group, dtype, device)
        _init_weight(self.weight, in_features, group)
        self.bias = None
        if bias:
            spec = ShardSpec(shape=(out_features,), sum_gradient=sequence_parallel)
            self.bias = _parameter(spec, group, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        if not self.input_is_parallel:
            x = scatter_to_region(x, self.group)
        y = self._product(x)
        return y if self.bias is None or self.skip_bias_add else y + self.bias

    def _product(self, x: Tensor) -> Tensor:
        if self.overlaps:
            return linear_reduce_scatter(x, self.weight, self.group, self.products)
        partial = _Linear.apply(x, self.weight, None, None, False, self.products)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence(partial, self.group)
        return reduce_from_region(partial, self.group)


class VocabParallelEmbedding(ShardedModule):
    """``(batch, seq)`` token ids -> ``(batch, seq, embedding_dim)``: each rank holds some rows.

    Any vocabulary goes over any number of ranks: each holds the same number of rows, a multiple of
    ``padding_multiple``, of which the last ones may be padding.

    Args:
        group: the tensor group.
        sequence_parallel: return a part of the sequence, ``(batch, seq / tensor, embedding_dim)``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        group: ProcessGroup,
        padding_multiple: int = 1,
        sequence_parallel: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.group = group
        self.sequence_parallel = sequence_parallel
        rows = -(-num_embeddings // group.size())
        spec = ShardSpec(
            shape=(num_embeddings, embedding_dim),
            dim=0,
            padded_run=-(-rows // padding_multiple) * padding_multiple,
        )
        self.weight = _parameter(spec, group, dtype, device)
        _init_weight(self.weight, embedding_dim, group)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ``ids``.

        Raises:
            ValueError: for an id outside the vocabulary (on a GPU, a device-side assertion).
        """
        self._check_ids(ids)
        if self.group.size() == 1:
            return _Embedding.apply(ids, None, self.weight)
        rows = self.weight.size(0)
        local = ids - self.group.rank() * rows
        elsewhere = (local < 0) | (local >= rows)
        partial = _Embedding.apply(local.masked_fill(elsewhere, 0), elsewhere, self.weight)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence(partial, self.group)
        return reduce_from_region(partial, self.group)

    def _check_ids(self, ids: Tensor) -> None:
        check_all(
            (ids >= 0) & (ids < self.num_embeddings),
            lambda: (
                f"token ids must be at least 0 and below the vocabulary size "
                f"{self.num_embeddings}, got {int(ids.min())} to {int(ids.max())}"
            ),
        )


class _Linear(torch.autograd.Function):
    """A linear layer whose input gradient is summed over a group while its weight's is computed.

    Without a group the input gradient is whole already.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: ProcessGroup | None,
        sequence_parallel: bool,
        products: Products,
    ) -> Tensor:
        # The gathered input is kept, so that the backward pass does not gather it once more.
        if group is not None and sequence_parallel:
            x = all_gather(x, group, SEQUENCE_DIM)
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        ctx.products, ctx.main_grad = products, main_grad(weight)
        return products.output(x, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        prepared = ctx.products.prepare(grad)
        partial = ctx.products.input_gradient(prepared, weight)
        pending: Pending | Done = Done(partial)
        if ctx.group is not None and ctx.sequence_parallel:
            pending = start_reduce_scatter(partial, ctx.group, SEQUENCE_DIM)
        elif ctx.group is not None:
            pending = start_all_reduce(partial, ctx.group)
        # A frozen parameter needs none.
        _, has_weight, has_bias, *_ = ctx.needs_input_grad
        grad_weight = None
        if has_weight:
            grad_weight = ctx.products.weight_gradient(prepared, x, ctx.main_grad)
        grad_bias = bias_gradient(grad) if has_bias else None
        return pending.wait(), grad_weight, grad_bias, None, None, None


class _Embedding(torch.autograd.Function):
    """Rows of ``weight``, zeros for the ids that are ``elsewhere``."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, elsewhere: Tensor | None, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, elsewhere, weight)
        rows = F.embedding(ids, weight)
        return rows if elsewhere is None else rows.masked_fill_(elsewhere.unsqueeze(-1), 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor | None]:
        ids, elsewhere, weight = ctx.saved_tensors
        if elsewhere is not None:
            grad = grad.masked_fill(elsewhere.unsqueeze(-1), 0)
        buffer = main_grad(weight)
        if buffer is not None and buffer.device.type == "cpu":
            # Only the rows that were read are touched. On a GPU the order of this sum is random.
            rows = grad.reshape(-1, grad.size(-1)).to(buffer.dtype)
            buffer.index_add_(0, ids.reshape(-1), rows)
            return None, None, None
        dense = torch.ops.aten.embedding_dense_backward(grad, ids, weight.size(0), -1, False)
        if buffer is None:
            return None, None, dense
        buffer.add_(dense)
        return None, None, None


def _parameter(
    spec: ShardSpec,
    group: ProcessGroup,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> nn.Parameter:
    """A parameter of zeros with this rank's part of ``spec``."""
    shape = spec.local_shape(group.size())
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
    set_shard_spec(parameter, spec)
    return parameter


def _init_weight(weight: nn.Parameter, fan_in: int, group: ProcessGroup) -> None:
    if weight.is_meta:
        return
    seed = int(torch.randint(2**62, (1,)))
    std = 1 / math.sqrt(3 * fan_in)
    init_normal(weight, seed=seed, name="", std=std, rank=group.rank(), size=group.size())


def _overlaps(symmetric_memory: bool, sequence_parallel: bool, group: ProcessGroup) -> bool:
    """Whether a layer communicates beside its products."""
    if symmetric_memory and not sequence_parallel:
        raise ValueError("symmetric_memory needs sequence_parallel")
    return symmetric_memory and group.size() > 1


def _check_divides(name: str, value: int, size: int) -> None:
    if value % size != 0:
        raise ValueError(f"{name} ({value}) must be a multiple of {size} (tensor group x blocks)")
