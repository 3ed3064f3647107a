"""Collectives of one layer, counted on their way to the process group, against theory.

    python -m megatron.benchmarks.communication [--json FILE]

Counted is one forward and backward pass of models with one and with three layers: the difference
is that of two layers, without embedding and head. Theory, for hidden states of n elements, over t
ranks:

    attention and MLP            an all-reduce each, forward and backward
    sequence parallelism         an all-gather and a reduce-scatter in place of each all-reduce
    full recomputation           the forward pass once more, up to its last reduction, whose result
                                 nobody needs
    elements that a rank sends   2 (t - 1) / t n for an all-reduce, half of it for the two others
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.benchmarks.program import Run, run_benchmark
from megatron.benchmarks.ranks import run_ranks
from megatron.cli import run_tool
from megatron.config import ModelConfig, Recompute
from megatron.launch import Launch
from megatron.model.init import build_model, init_parameters
from megatron.model.inputs import ModelInputs
from megatron.model.placement import Placement
from megatron.report.tables import Row, Table
from mpu import ParallelDims, RngStreams

# For each operation: where, among its arguments, the tensor with the elements of all ranks is; and
# how often a ring passes these elements on.
_WHOLE = {"allreduce_": 0, "_allgather_base_": 0, "_reduce_scatter_base_": 1}
_ROUNDS = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1}

BATCH = 2
CONFIG = ModelConfig(num_layers=1, hidden_size=48, num_heads=8, vocab_size=509, seq_length=32)


class Communication(TorchDispatchMode):
    """Counts, while entered, the collectives that this thread starts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.wire_bytes: Counter[str] = Counter()

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            whole = args[_WHOLE[name]]
            tensors = [whole] if isinstance(whole, Tensor) else whole
            self.calls[name] += 1
            self.wire_bytes[name] += _ROUNDS[name] * sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))

    def bytes_sent(self, num_ranks: int) -> float:
        """Bytes that each of ``num_ranks`` sends, around a ring."""
        return self.wire_bytes.total() * (num_ranks - 1) / num_ranks


@dataclass(frozen=True)
class Count:
    """Calls of one layer, and hidden states that each rank sends."""

    calls: float
    hidden_states: float


def theory(sequence: bool, recompute: Recompute, tensor: int) -> Count:
    """What one layer needs on ``tensor`` ranks."""
    calls_in_a_pass, rounds = (4, 1) if sequence else (2, 2)
    calls = 2 * calls_in_a_pass
    if recompute == "full":
        calls += calls_in_a_pass - 1
    return Count(calls, calls * rounds * (tensor - 1) / tensor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code."""
    description = "Collectives of one layer, counted, against theory."
    return run_benchmark("communication", description, measure, argv, timed=False)


def measure(run: Run) -> Iterator[Table]:
    """The table of all kinds of layers."""
    sizes = (2,) if run.quick else (2, 4)
    rows = [row for tensor in sizes for row in count_on(tensor)]
    yield Table("Collectives of one layer, forward and backward", rows)


def count_on(tensor: int) -> Iterator[Row]:
    """One row for each kind of layer on ``tensor`` ranks."""
    counts: dict[tuple[bool, Recompute], Count] = run_ranks(
        ParallelDims(tensor=tensor), count_layers
    )[0]
    for (sequence, recompute), count in counts.items():
        want = theory(sequence, recompute, tensor)
        yield {
            "tensor ranks": tensor,
            "sequence parallel": "yes" if sequence else "no",
            "recompute": recompute,
            "calls": count.calls,
            "calls in theory": want.calls,
            "hidden states sent": count.hidden_states,
            "sent in theory": want.hidden_states,
        }


def count_layers(launch: Launch) -> dict[tuple[bool, Recompute], Count]:
    """Counts of all kinds of layers on this rank."""
    kinds: list[tuple[bool, Recompute]] = [
        (s, r) for s in (False, True) for r in get_args(Recompute)
    ]
    return {kind: _count_layer(launch, *kind) for kind in kinds}


def _count_layer(launch: Launch, sequence: bool, recompute: Recompute) -> Count:
    one, three = (_count_model(launch, layers, sequence, recompute) for layers in (1, 3))
    state_bytes = BATCH * CONFIG.seq_length * CONFIG.hidden_size * torch.float32.itemsize
    sent = three.bytes_sent(launch.world_size) - one.bytes_sent(launch.world_size)
    calls = three.calls.total() - one.calls.total()
    return Count(calls / 2, sent / 2 / state_bytes)


def _count_model(
    launch: Launch, num_layers: int, sequence: bool, recompute: Recompute
) -> Communication:
    """The collectives of one microbatch."""
    config = replace(CONFIG, num_layers=num_layers)
    placement = Placement(launch.groups.tensor, sequence)
    model = build_model(
        config, placement, device=launch.device, backend="explicit", recompute=recompute
    )
    init_parameters(model.named_parameters(), config, placement, seed=1)
    tokens = torch.zeros(BATCH, config.seq_length, dtype=torch.int64)
    inputs = ModelInputs(tokens, tokens, torch.ones(tokens.shape), torch.arange(BATCH))
    with Communication() as communication:
        model(inputs, RngStreams(1, inputs.samples)).backward()
    return communication


if __name__ == "__main__":
    run_tool(main)
