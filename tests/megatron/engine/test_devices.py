"""On a device, all ranks ask for the same collectives, and the CPU waits once a step.

The device is not there (``tests.pretend``): a run on it has no values, but every tensor has its
place. All layouts that training is compared at go over it, with the precisions in turn; the suite
takes a few of them, and the marker nightly has the rest. That faults would be found is shown by
planting some.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.model.language_model import TransformerLanguageModel
from megatron.optim.flat_parameters import FlatParameters
from megatron.training import replicas
from tests.distributed import preload, run_ranks
from tests.figures import Figure
from tests.megatron.engine.device_runs import Plant, Run, Watched, watch_rank
from tests.megatron.engine.layouts import CHOSEN, EVERY
from tests.megatron.engine.test_layouts import OTHERS
from tests.megatron.engine.training import GLOBAL_BATCH, Dtype, Layout
from tests.pretend.device import AVAILABLE
from tests.pretend.matching import find_faults

preload(__name__, "torch.distributed.fsdp", "torch.distributed.tensor")

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch takes no device from Python")

STEP = Counter({"aten._local_scalar_dense.default at megatron/engine/torch_engine.py": 2})
"""The two numbers that a step reads, at once."""
EVALUATION = Counter({"aten._local_scalar_dense.default at megatron/engine/torch_engine.py": 1})
SELECTED = Run(Layout(data=2, zero=3, micro_batch=2, num_layers=1), "fp16")
TIED = Run(Layout(pipeline=2, data=2, zero=1, micro_batch=2, num_layers=2))
"""Of the word embedding, which both stages have, some ranks hold nothing."""
STAGES = Run(Layout(pipeline=2, micro_batch=4, num_layers=2), is_short=True)
"""The first of the two has no loss."""
ALONE = Run(Layout(micro_batch=8, num_layers=1), is_short=True)


def _in_turn() -> list[Run]:
    """Every layout, with no more microbatches than its schedule needs, and a precision."""
    dtypes: Sequence[Dtype] = ("bf16", "fp16", "fp32")
    return [
        Run(_briefly(layout), dtypes[index % len(dtypes)])
        for index, layout in enumerate([*EVERY, *CHOSEN, *OTHERS])
    ]


def _briefly(layout: Layout) -> Layout:
    count = min(max(2, layout.pipeline), GLOBAL_BATCH // layout.data)
    return replace(layout, micro_batch=GLOBAL_BATCH // layout.data // count)


def _of_one_rank() -> list[Run]:
    """What a model on one rank may compute with."""
    return [
        Run(
            Layout(micro_batch=4, num_layers=1, recompute=recompute),
            dtype,
            dropout=backend != "sdpa",
            backend=backend,
            model=(
                ("position_embedding", positions),
                ("alibi_precision", precision),
                ("activation", activation),
            ),
        )
        for backend in ("explicit", "blocked", "sdpa")
        for positions, precision, activation, dtype, recompute in (
            ("alibi", "exact", "gelu", "bf16", "none"),
            ("alibi", "bloom_bf16", "swiglu", "bf16", "full"),
            ("rotary", "exact", "geglu", "fp16", "selective"),
            ("learned", "exact", "reglu", "fp32", "none"),
        )
    ]


def test_ranks_agree_and_the_cpu_waits_once_a_step(tmp_path: Path, figure: Figure) -> None:
    check_run(SELECTED, tmp_path, figure)


@pytest.mark.nightly
@pytest.mark.parametrize("run", [*_in_turn(), *_of_one_rank()], ids=str)
def test_ranks_agree_and_the_cpu_waits_once_a_step_at_every_layout(
    run: Run, tmp_path: Path, figure: Figure
) -> None:
    check_run(run, tmp_path, figure)


def check_run(run: Run, folder: Path, figure: Figure) -> None:
    ranks = run_ranks(run.layout.world_size, watch_rank, run, folder / "saves")
    check_ranks(ranks, figure)


def check_ranks(ranks: Sequence[Watched], figure: Figure, steps: int = 1) -> None:
    """Fail if ranks differ, or if one waited for the device without need in ``steps`` steps."""
    assert not any(rank.error for rank in ranks)
    faults = find_faults([rank.calls for rank in ranks])
    extra = [wait for rank in ranks for wait in surplus(rank, steps)]
    calls = sum(len(rank.calls) for rank in ranks)
    figure("on a device", calls=calls, mixed_calls=len(faults), needless_waits=len(extra))
    assert faults == []
    assert extra == []


def waits(rank: Watched, phase: str) -> Counter[str]:
    """How often the CPU waited, by the operation and the file."""
    found = [wait for wait in rank.waits if wait.phase == phase]
    return Counter(f"{wait.cause} at {wait.place.split(':')[0]}" for wait in found)


def surplus(rank: Watched, steps: int = 1) -> list[str]:
    """What the CPU waited for without need in ``steps`` steps and an evaluation."""
    allowed = Counter({wait: count * steps for wait, count in STEP.items()})
    extra = (waits(rank, "step") - allowed) + (waits(rank, "evaluation") - EVALUATION)
    return sorted((extra + waits(rank, "trial") + waits(rank, "build")).elements())


def on_first(plant: Plant) -> Plant:
    """Plant it on rank 0 alone."""
    return lambda patch: plant(patch) if dist.get_rank() == 0 else None


def on_last(plant: Plant) -> Plant:
    return lambda patch: plant(patch) if dist.get_rank() > 0 else None


def zero_of_nothing_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """What a rank that holds nothing once compared."""

    def fingerprint_of(entry: Any, device: torch.device) -> Tensor:
        sums = [replicas.fingerprint(box, entry.shape) for box in entry.boxes]
        return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64)

    patch.setattr(replicas, "_fingerprint_of", fingerprint_of)
    patch.setattr(replicas.torch, "stack", _stack_of_one_device)


def _stack_of_one_device(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """A rank that holds none of a tensor's copies stacks zeros of the CPU only."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        tensors = [tensor for tensor in tensors if tensor.device.type != "cpu"]
    return torch._C._VariableFunctions.stack(tensors, dim)  # type: ignore[attr-defined]


def totals(change: Any) -> Plant:
    """Let the sums of a step be other tensors."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        all_reduce = dist.all_reduce

        def changed(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            return all_reduce(change(tensor) if tensor.numel() == 2 else tensor, *args, **kwargs)

        patch.setattr(dist, "all_reduce", changed)

    return plant


def another_reduction(patch: pytest.MonkeyPatch) -> None:
    all_reduce = dist.all_reduce

    def changed(tensor: Tensor, **kwargs: Any) -> Any:
        return all_reduce(tensor, **{**kwargs, "op": dist.ReduceOp.MAX})

    patch.setattr(dist, "all_reduce", changed)


def no_norm(patch: pytest.MonkeyPatch) -> None:
    def own(parameters: FlatParameters) -> Tensor:
        return torch.ones((), dtype=torch.float64, device=parameters._device)

    patch.setattr(FlatParameters, "gradient_norm", own)


def room_of(change: Any) -> Plant:
    """Let what is received be another tensor than what is sent."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        irecv = dist.irecv
        patch.setattr(dist, "irecv", lambda tensor, **kwargs: irecv(change(tensor), **kwargs))

    return plant


def no_transfer(patch: pytest.MonkeyPatch) -> None:
    done = Mock(**{"is_completed.return_value": True})
    patch.setattr(dist, "isend", lambda tensor, **kwargs: done)


def in_forward(action: Any) -> Plant:
    """Do something with the tokens of each forward pass."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        forward = TransformerLanguageModel.forward

        def changed(model: TransformerLanguageModel, tokens: Tensor, **kwargs: Any) -> Tensor:
            action(tokens)
            return forward(model, tokens, **kwargs)

        patch.setattr(TransformerLanguageModel, "forward", changed)

    return plant


MISMATCHES: dict[str, tuple[Plant, str]] = {
    "a sum on the CPU": (
        on_first(totals(lambda total: torch.zeros(2, dtype=torch.float64))),
        "rank 0 gives a tensor that is not on the device: allreduce_ of 2 float64 on cpu",
    ),
    "a sum of another precision": (
        on_first(totals(lambda total: total.float())),
        "ranks 0 and 1: allreduce_ of 2 float32 .* but allreduce_ of 2 float64",
    ),
    "a sum of another size": (
        on_first(totals(lambda total: total.repeat(2))),
        "ranks 0 and 1: allreduce_ of 4 float64 .* but allreduce_ of 2 float64",
    ),
    "another reduction": (on_first(another_reduction), r"\(MAX\) .* but .* \(SUM\)"),
    "no sum at all": (on_first(no_norm), "ranks 0 and 1: .* but allreduce_ of 1 float64"),
    "room of another precision": (
        room_of(lambda tensor: tensor.float()),
        "ranks 0 and 1: transfer of .* bfloat16 .* but transfer of .* float32",
    ),
    "room of another size": (
        room_of(lambda tensor: tensor.repeat(2, 1, 1)),
        "ranks 0 and 1: transfer of 1024 bfloat16 .* but transfer of 2048 bfloat16",
    ),
    "room on the CPU": (
        on_last(room_of(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))),
        "rank 1 gives a tensor that is not on the device: recv_ of 1024 bfloat16 on cpu",
    ),
    "nothing sent": (no_transfer, "ranks 0 and 1: None, but transfer"),
}


@pytest.fixture(scope="module")
def mismatched(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Watched]]:
    return run_ranks(2, watch_mismatches, tmp_path_factory.mktemp("saves"))


def watch_mismatches(folder: Path) -> dict[str, Watched]:
    return {name: watch_rank(STAGES, folder, plant) for name, (plant, _) in MISMATCHES.items()}


@pytest.mark.parametrize("name", MISMATCHES)
def test_planted_collectives_that_differ_are_found_and_named(
    name: str, mismatched: list[dict[str, Watched]]
) -> None:
    faults = find_faults([rank[name].calls for rank in mismatched])
    assert re.search(MISMATCHES[name][1], "\n".join(faults))


def test_ranks_that_hold_nothing_take_part_on_the_device(tmp_path: Path, figure: Figure) -> None:
    """And the check that once waited for ever would be seen to."""
    ranks = run_ranks(4, watch_tied, tmp_path)
    check_ranks([right for right, _ in ranks], figure)
    faults = find_faults([wrong.calls for _, wrong in ranks])
    message = r"rank \d gives a tensor that is not on the device: .* on cpu .*replicas.py"
    assert re.search(message, "\n".join(faults))


def watch_tied(folder: Path) -> tuple[Watched, Watched]:
    wrong = watch_rank(replace(TIED, is_short=True), folder, zero_of_nothing_on_the_cpu)
    return watch_rank(TIED, folder), wrong


WAITS: dict[str, tuple[Plant, str]] = {
    "a number is read": (in_forward(lambda x: x.sum().item()), "_local_scalar_dense"),
    "a copy of memory that is not pinned": (
        in_forward(lambda x: torch.ones(3).to(x.device, non_blocking=True)),
        "_to_copy.* not pinned",
    ),
}


def test_planted_waits_are_found_and_named(tmp_path: Path) -> None:
    (found,) = run_ranks(1, watch_waits, tmp_path)
    for name, (_, cause) in WAITS.items():
        place = "tests/megatron/engine/test_devices.py"
        assert re.search(f"{cause}.* at {place}", "\n".join(surplus(found[name]))), name


def watch_waits(folder: Path) -> dict[str, Watched]:
    return {name: watch_rank(ALONE, folder, plant) for name, (plant, _) in WAITS.items()}


def test_a_tensor_of_the_default_device_is_an_error(tmp_path: Path) -> None:
    (rank,) = run_ranks(1, watch_default_device, tmp_path)
    assert rank.error.startswith("aten.add.Tensor of tensors of two devices at tests/megatron/")


def watch_default_device(folder: Path) -> Watched:
    return watch_rank(ALONE, folder, in_forward(lambda x: x + torch.ones(x.size(-1))))
