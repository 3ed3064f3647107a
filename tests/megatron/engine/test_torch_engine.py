"""The torch engine: what it refuses, keeps, loads and calls, at layouts of every kind.

That training is the same at all of them is tested in test_layouts.
"""

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron.apex import fused_adam, fused_layer_norm
from megatron.engine.base import Engine, StepResult
from megatron.engine.torch_engine import TorchEngine
from megatron.errors import ConfigError, NonFiniteError
from mpu import ShardedTensor, shard_spec
from tests.distributed import run_ranks
from tests.megatron.engine.training import (
    DEEPSPEED_KINDS,
    NUM_LAYERS,
    Layout,
    build_any_engine,
    build_engine,
    join_states,
    make_config,
    microbatches,
    spoiled,
    train,
)
from tests.shards import region

ONE = Layout()
# One of each keeper of parameters, and of each schedule.
KINDS = [
    Layout(tensor=2, data=2),
    Layout(tensor=2, pipeline=2, sequence=True),
    Layout(pipeline=2, data=2, zero=1, schedule="zero_bubble"),
    Layout(pipeline=2, data=2, zero=2, schedule="interleaved_1f1b", chunks=2),
    Layout(data=4, zero=3),
]


@pytest.mark.parametrize("layout", [*KINDS, *DEEPSPEED_KINDS], ids=str)
def test_nan_stops_every_rank_before_the_update(layout: Layout) -> None:
    results = run_ranks(layout.world_size, check_nan, layout)
    assert len({str(result) for result in results}) == 1


def check_nan(layout: Layout) -> StepResult:
    """One data rank has a NaN; afterwards training goes on as if the step had not been."""
    config = make_config(layout)
    engine, groups = build_any_engine(config)
    list(train(engine, config, groups, range(2)))
    before = state_of(engine)
    inputs = microbatches(config, 2, groups)
    if groups.data.rank() == groups.data.size() - 1:
        inputs[1] = spoiled(inputs[1])
    with pytest.raises(NonFiniteError, match="loss nan and gradient norm (nan|inf) must be finite"):
        engine.train_step(inputs, lr=1e-2)
    assert_same_state(state_of(engine), before)

    twin, twin_groups = build_any_engine(config)
    list(train(twin, config, twin_groups, range(2)))
    (got,) = train(engine, config, groups, range(2, 3))
    (want,) = train(twin, config, twin_groups, range(2, 3))
    assert got == want
    assert_same_state(state_of(engine), state_of(twin))
    return got


def state_of(engine: Engine) -> dict[str, Tensor]:
    """A copy of what this rank holds of the state, by kind, name and place."""
    return {
        f"{state.kind} of {state.name} from {box.start}": box.tensor.detach().clone()
        for state in engine.state()
        for box in state.boxes
    }


def assert_same_state(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("layout", KINDS[:3], ids=str)
def test_low_precision_keeps_main_parameters_in_fp32(layout: Layout, dtype: str) -> None:
    run_ranks(layout.world_size, check_main_parameters, layout, dtype)


def check_main_parameters(layout: Layout, dtype: Any) -> None:
    config = make_config(layout, dtype=dtype)
    low = config.train.torch_dtype
    engine, groups = build_engine(config)
    for result in train(engine, config, groups, range(3)):
        assert 0 < result.grad_norm < 100
        assert not result.skipped
    boxes = [box.tensor for state in engine.state() for box in state.boxes]
    assert {box.dtype for box in boxes} == {torch.float32}
    assert any(not torch.equal(box, box.to(low).float()) for box in boxes)
    weights = whole_weights(engine, groups.tensor.rank(), groups.tensor.size())
    for state in (state for state in engine.state() if state.kind == "weight"):
        for box in state.boxes:
            rounded = box.tensor.to(low)
            assert torch.equal(weights[state.name][region(box)], rounded), state.name


def whole_weights(engine: TorchEngine, rank: int, size: int) -> dict[str, Tensor]:
    """What the models of this rank compute with, in whole tensors, NaN where others compute."""
    weights = {}
    for model in engine.models:
        for name, parameter in model.named_parameters():
            assert parameter.grad is None
            spec = shard_spec(parameter)
            weights[name] = torch.full(spec.shape, torch.nan, dtype=parameter.dtype)
            for box in spec.boxes(parameter.detach(), rank, size):
                weights[name][region(box)] = box.tensor
    return weights


@pytest.mark.parametrize("dtype", ["fp64", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "apex_adamw"])
def test_loaded_state_goes_on_bit_for_bit(dtype: str, optimizer: str) -> None:
    run_ranks(1, check_loaded_state, ONE, dtype, optimizer)


@pytest.mark.parametrize("layout", [*KINDS, *DEEPSPEED_KINDS], ids=str)
def test_loaded_state_goes_on_bit_for_bit_at_every_kind_of_layout(layout: Layout) -> None:
    run_ranks(layout.world_size, check_loaded_state, layout, None, "adamw")


def check_loaded_state(layout: Layout, dtype: Any, optimizer: Any) -> None:
    install_apex()
    config = make_config(layout, dtype=dtype, optimizer=optimizer)
    engine, groups = build_any_engine(config)
    list(train(engine, config, groups, range(3)))
    saved, scalars = state_of(engine), engine.scalars()
    want = list(train(engine, config, groups, range(3, 6)))

    other, other_groups = build_any_engine(config)

    def read(states: Sequence[ShardedTensor]) -> None:
        for state in states:
            for box in state.boxes:
                saved_box = saved[f"{state.kind} of {state.name} from {box.start}"]
                box.tensor.detach().copy_(saved_box)

    other.load_state(read, scalars)
    assert list(train(other, config, other_groups, range(3, 6))) == want
    assert_same_state(state_of(other), state_of(engine))
    assert other.scalars() == engine.scalars()
    assert engine.scalars()["updates"] == 6


@pytest.mark.parametrize("layout", [ONE, *KINDS, *DEEPSPEED_KINDS], ids=str)
def test_state_names_every_parameter_three_times(layout: Layout) -> None:
    (shapes,) = run_ranks(1, shapes_of_one_process)
    whole = join_states(run_ranks(layout.world_size, state_of_rank, layout))
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    want = {f"{kind} of {name}": shape for name, shape in shapes.items() for kind in kinds}
    assert {name: tuple(tensor.shape) for name, tensor in whole.items()} == want


def shapes_of_one_process() -> dict[str, tuple[int, ...]]:
    engine, _ = build_engine(make_config(ONE))
    return {name: shard_spec(p).shape for name, p in engine.models[0].named_parameters()}


def state_of_rank(layout: Layout) -> list[ShardedTensor]:
    engine, _ = build_any_engine(make_config(layout))
    return engine.state()


def test_apex_is_used_when_asked_for() -> None:
    run_ranks(1, check_apex)


def check_apex() -> None:
    """Its stand-ins compute what torch does, so that training is the same."""
    install_apex()
    plain, apex = make_config(ONE), make_config(ONE, layernorm="apex", optimizer="apex_adamw")
    results, engines = [], []
    for config in (plain, apex):
        engine, groups = build_engine(config)
        results.append(list(train(engine, config, groups, range(6))))
        engines.append(engine)
    norms = [
        sum(isinstance(module, FusedLayerNorm) for module in engine.models[0].modules())
        for engine in engines
    ]
    # Two in each layer, after the embedding, and at the end.
    assert norms == [0, 2 * NUM_LAYERS + 2]
    for want, got in zip(*results, strict=True):
        assert got.loss == pytest.approx(want.loss, rel=1e-12)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-12)


class FusedLayerNorm(nn.LayerNorm):
    """Stands in for apex's."""


class FusedAdam(Optimizer):
    """Stands in for apex's, which counts its steps once for each group."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - beta2)
        mean = state["exp_avg"] / (1 - beta1 ** group["step"])
        square = state["exp_avg_sq"] / (1 - beta2 ** group["step"])
        update = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * parameter
        parameter.sub_(group["lr"] * update)


def install_apex() -> None:
    """Give this process an apex; only for a process of its own."""
    normalization, optimizers = ModuleType("apex.normalization"), ModuleType("apex.optimizers")
    vars(normalization)["FusedLayerNorm"] = FusedLayerNorm
    vars(optimizers)["FusedAdam"] = FusedAdam
    apex = ModuleType("apex")
    for module in (apex, normalization, optimizers):
        sys.modules[module.__name__] = module


@pytest.mark.parametrize("module", [None, ModuleType("apex")], ids=["none", "another"])
@pytest.mark.parametrize(
    ("load", "option"),
    [(fused_layer_norm, "model.layernorm apex"), (fused_adam, "optimizer.name apex_adamw")],
)
def test_missing_or_wrong_apex_is_refused(
    load: Callable[[], type[Any]],
    option: str,
    module: ModuleType | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # None in sys.modules makes an import of that name fail.
    monkeypatch.setitem(sys.modules, "apex", module)
    with pytest.raises(ConfigError, match=f"^{option} needs NVIDIA's apex, built from source"):
        load()
