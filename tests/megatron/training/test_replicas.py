"""Copies that drift apart stop the run, and are named with the ranks that hold them."""

import time
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.engine.torch_engine import TorchEngine
from megatron.errors import ReplicaError
from megatron.training.replicas import check_replicas, fingerprint
from mpu import Box
from tests.distributed import run_ranks
from tests.figures import Figure
from tests.megatron.engine.training import (
    DEEPSPEED_KINDS,
    Layout,
    build_any_engine,
    build_engine,
    make_config,
    train,
)

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class Flip:
    """A bit that flips in the memory of one rank, and what the check says of it."""

    layout: Layout
    rank: int
    kind: str
    name: str
    verdict: str

    def __str__(self) -> str:
        return f"{self.kind} of {self.name} on rank {self.rank} of {self.layout}"


LAYER = "language_model.transformer.layers.1."
FLIPS = [
    Flip(
        Layout(tensor=2, data=2),
        1,
        "weight",
        LAYER + "input_layernorm.weight",
        "rank 1 differs from the others",
    ),
    Flip(
        Layout(data=4, micro_batch=2),
        2,
        "weight",
        LAYER + "mlp.dense_h_to_4h.weight",
        "rank 2 differs from the others",
    ),
    Flip(
        Layout(pipeline=2, data=2),
        3,
        "weight",
        "language_model.embedding.word_embeddings.weight",
        "rank 3 differs from the others",
    ),
    Flip(
        Layout(tensor=4, micro_batch=2, sequence=True),
        3,
        "weight",
        LAYER + "self_attention.dense.bias",
        "rank 3 differs from the others",
    ),
    Flip(
        Layout(data=2),
        1,
        "exp_avg_sq",
        LAYER + "self_attention.query_key_value.weight",
        "ranks 0, 1 differ",
    ),
    # Cut over the data ranks, at another place on each of the two stages.
    Flip(
        Layout(pipeline=2, data=2, zero=1),
        3,
        "exp_avg",
        "language_model.embedding.word_embeddings.weight",
        "ranks 0, 1, 2, 3 differ",
    ),
    Flip(
        Layout(tensor=2, data=2, zero=3),
        1,
        "exp_avg",
        LAYER + "mlp.dense_4h_to_h.bias",
        "ranks 0, 1 differ",
    ),
]


@pytest.mark.parametrize("flip", FLIPS, ids=str)
def test_one_flipped_bit_is_found_and_named(flip: Flip) -> None:
    messages = set(run_ranks(flip.layout.world_size, check_flip, flip))
    expected = f"of the copies of the {flip.kind} of {flip.name}, {flip.verdict}"
    assert messages == {f"replicas are out of sync: {expected}"}


def check_flip(flip: Flip) -> str:
    config = make_config(flip.layout)
    engine, groups = build_engine(config)
    list(train(engine, config, groups, range(1)))
    check_replicas(engine, groups)
    if dist.get_rank() == flip.rank:
        (state,) = (
            state for state in engine.state() if (state.kind, state.name) == (flip.kind, flip.name)
        )
        flip_bit(state.boxes[0].tensor)
    with pytest.raises(ReplicaError) as caught:
        check_replicas(engine, groups)
    assert caught.value.on_every_rank
    assert caught.value.exit_code == 7
    return str(caught.value)


def flip_bit(tensor: torch.Tensor, bit: int = 0) -> None:
    """Flip a bit of the last element."""
    bits = tensor.view(INTEGERS[tensor.dtype])
    bits[(-1,) * bits.dim()] ^= 1 << bit


CLIPPED = [
    Layout(tensor=2, micro_batch=2),
    *(replace(kind, tensor=2, micro_batch=2) for kind in DEEPSPEED_KINDS if kind.data == 1),
]


@pytest.mark.parametrize("layout", CLIPPED, ids=str)
def test_wrong_clip_factor_on_one_tensor_rank_is_found(layout: Layout) -> None:
    """As when ranks of a tensor group clip copies by norms of their own."""
    (message,) = set(run_ranks(layout.world_size, check_clip, layout))
    assert "replicas are out of sync" in message
    assert "ranks 0, 1 differ" in message


def check_clip(layout: Layout) -> str:
    """A step that is right is in sync; one with the fault is not."""
    config = make_config(layout)
    engine, groups = build_any_engine(config)
    list(train(engine, config, groups, range(1)))
    check_replicas(engine, groups)
    if groups.tensor.rank() == 1:
        plant(engine)
    list(train(engine, config, groups, range(1, 2)))
    with pytest.raises(ReplicaError) as caught:
        check_replicas(engine, groups)
    return str(caught.value)


def plant(engine: Any) -> None:
    """Let this rank not clip."""
    if isinstance(engine, TorchEngine):
        engine._clip_factor = torch.ones_like  # type: ignore[assignment,method-assign]
    else:
        engine._engine.optimizer.clip_grad = 0.0


def test_every_bit_counts() -> None:
    for dtype in INTEGERS:
        tensor = torch.randn(3, 5).to(dtype)
        before = fingerprint(Box((0, 0), tensor), tensor.shape)
        for bit in range(8 * dtype.itemsize - 1):
            flip_bit(tensor, bit)
            assert fingerprint(Box((0, 0), tensor), tensor.shape) != before, (dtype, bit)
            flip_bit(tensor, bit)


def test_parts_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(7, 5)
    want = fingerprint(Box((0, 0), whole), whole.shape)
    monkeypatch.setattr("megatron.training.replicas._ELEMENTS", 10)
    boxes = [
        Box((0, 0), whole[:2]),
        Box((2, 0), whole[2:3, :3]),
        Box((2, 3), whole[2:3, 3:]),
        Box((3, 0), whole[3:]),
    ]
    assert sum(fingerprint(box, whole.shape) for box in boxes) == want


def test_check_every_hundred_steps_costs_less_than_a_hundredth(figure: Figure) -> None:
    shares = run_ranks(2, measure_cost)
    figure("replica check every 100 steps, share of a step", share=max(shares))
    assert max(shares) < 0.01


def measure_cost() -> float:
    config = make_config(Layout(data=2), dtype="fp32")
    engine, groups = build_engine(config)
    step = min(timed(lambda: list(train(engine, config, groups, range(1)))) for _ in range(6))
    check = min(timed(lambda: check_replicas(engine, groups)) for _ in range(6))
    return check / step / 100


def timed(action: Any) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def test_engine_has_copies_along_every_axis() -> None:
    """What the checks above rely on."""
    found = run_ranks(4, axes, Layout(tensor=2, pipeline=2, micro_batch=2))
    assert found[0] == found[3] == {"tensor", "data", "embedding"}
    assert run_ranks(2, axes, Layout(data=2, zero=2)) == [{"tensor"}] * 2


def axes(layout: Layout) -> set[str]:
    engine: TorchEngine
    engine, _ = build_engine(make_config(layout))
    return {axis for state in engine.state() for axis in state.replicated_over}
