"""Training by the torch engine: the same at every layout, in every precision what it promises."""

import math
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron.apex import fused_adam, fused_layer_norm
from megatron.engine.base import StepResult
from megatron.engine.torch_engine import TorchEngine
from megatron.errors import ConfigError, NonFiniteError
from megatron.optim.main_parameters import MainParameters
from tests.distributed import run_ranks
from tests.figures import Figure
from tests.megatron.engine.training import (
    NUM_HEADS,
    Layout,
    Run,
    build_engine,
    make_config,
    microbatches,
    run_training,
    spoiled,
    train,
)

STEPS = 20
TOLERANCE = 1e-12
ONE = Layout()
LAYOUTS = [
    Layout(micro_batch=2),
    Layout(micro_batch=4),
    Layout(tensor=2),
    Layout(tensor=2, sequence=True),
    Layout(tensor=4, micro_batch=4),
    Layout(tensor=4, sequence=True, micro_batch=4),
    Layout(data=2),
    Layout(data=2, micro_batch=2),
    Layout(tensor=2, data=2, sequence=True),
]


@cache
def one_process() -> Run:
    return run_training(ONE, STEPS)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_equals_one_process(layout: Layout, figure: Figure) -> None:
    want, got = one_process(), run_training(layout, STEPS)
    steps = list(zip(got.results, want.results, strict=True))
    worst = {
        "loss": max(difference(got.loss, want.loss) for got, want in steps),
        "norm": max(difference(got.grad_norm, want.grad_norm) for got, want in steps),
        "evaluation": difference(got.evaluation, want.evaluation),
        "state": max(errors(got.state, want.state).values()),
    }
    figure(f"training equals one process: {layout}", **worst)
    assert {name: error for name, error in worst.items() if not error <= TOLERANCE} == {}


def difference(got: float, want: float) -> float:
    """Relative."""
    return abs(got / want - 1)


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each tensor, in parts of its largest element."""
    assert got.keys() == want.keys()
    found = {}
    for name in want:
        a, b = comparable(name, got[name]), comparable(name, want[name])
        found[name] = ((a - b).abs().max() / b.abs().max()).item()
    assert not [name for name, error in found.items() if math.isnan(error)]
    return found


def comparable(name: str, tensor: Tensor) -> Tensor:
    """All of ``tensor``, without biases of keys.

    A softmax cancels those: their gradient is rounding alone, which Adam scales up.
    """
    if not name.endswith("query_key_value.bias"):
        return tensor
    return tensor.view(NUM_HEADS, 3, -1)[:, ::2]


def test_the_compared_run_learns_warms_up_and_clips() -> None:
    results = one_process().results
    assert results[-1].loss < results[0].loss
    assert sum(result.grad_norm > 0.5 for result in results) > STEPS / 2
    assert len({result.loss for result in results}) == STEPS


def test_nan_stops_every_rank_before_the_update() -> None:
    results = run_ranks(4, check_nan)
    assert len({str(result) for result in results}) == 1


def check_nan() -> StepResult:
    """One data rank has a NaN; afterwards training goes on as if the step had not been."""
    config = make_config(Layout(tensor=2, data=2))
    engine, groups = build_engine(config)
    list(train(engine, config, groups, range(2)))
    before = state_of(engine)
    inputs = microbatches(config, 2, groups)
    wrong = [inputs[0], spoiled(inputs[1])] if groups.data.rank() == 1 else inputs
    with pytest.raises(NonFiniteError, match="loss nan and gradient norm nan must be finite"):
        engine.train_step(wrong, lr=1e-2)
    assert_same_state(state_of(engine), before)
    assert all(torch.isfinite(p).all() for p in engine.model.parameters())

    twin, twin_groups = build_engine(config)
    list(train(twin, config, twin_groups, range(2)))
    (got,) = train(engine, config, groups, range(2, 3))
    (want,) = train(twin, config, twin_groups, range(2, 3))
    assert got == want
    assert_same_state(state_of(engine), state_of(twin))
    return got


def state_of(engine: TorchEngine) -> dict[str, Tensor]:
    """A copy of the state by kind and name."""
    return {f"{s.kind} of {s.name}": s.tensor.clone() for s in engine.named_state()}


def assert_same_state(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_bf16_keeps_main_parameters_in_fp32() -> None:
    run_ranks(2, check_bf16)


def check_bf16() -> None:
    config = make_config(Layout(tensor=2, sequence=True), dtype="bf16")
    engine, groups = build_engine(config)
    for result in train(engine, config, groups, range(3)):
        assert 0 < result.grad_norm < 100
        mains = {s.name: s.tensor for s in engine.named_state() if s.kind == "weight"}
        assert {s.tensor.dtype for s in engine.named_state()} == {torch.float32}
        for name, parameter in engine.model.named_parameters():
            assert parameter.dtype == torch.bfloat16
            assert torch.equal(parameter, mains[name].bfloat16()), name
            assert parameter.grad is None
    assert any(not torch.equal(main, main.bfloat16().float()) for main in mains.values())


def test_bf16_gradients_add_up_in_fp32() -> None:
    layer = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    parameters = MainParameters(layer)
    (main,) = (main for _, main in parameters.named())
    gradients = torch.randn(300, 8, 8).bfloat16()
    in_fp32, in_bf16 = torch.zeros(8, 8), torch.zeros(8, 8, dtype=torch.bfloat16)
    for gradient in gradients:
        (layer.weight * gradient).sum().backward()
        in_fp32 += gradient
        in_bf16 += gradient
    assert main.grad is not None
    assert torch.equal(main.grad, in_fp32)
    assert not torch.equal(main.grad, in_bf16.float())


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "apex_adamw"])
def test_loaded_state_goes_on_bit_for_bit(dtype: str, optimizer: str) -> None:
    run_ranks(1, check_loaded_state, dtype, optimizer)


def check_loaded_state(dtype: Any, optimizer: Any) -> None:
    install_apex()
    config = make_config(ONE, dtype=dtype, optimizer=optimizer)
    engine, groups = build_engine(config)
    list(train(engine, config, groups, range(3)))
    saved = state_of(engine)
    want = list(train(engine, config, groups, range(3, 6)))

    other, other_groups = build_engine(config)
    for state in other.named_state():
        state.tensor.copy_(saved[f"{state.kind} of {state.name}"])
    other.state_loaded(step=3)
    assert list(train(other, config, other_groups, range(3, 6))) == want
    assert_same_state(state_of(other), state_of(engine))


def test_state_names_every_parameter_three_times() -> None:
    run_ranks(1, check_state_names)


def check_state_names() -> None:
    engine, _ = build_engine(make_config(ONE))
    names = {name for name, _ in engine.model.named_parameters()}
    found = [(s.name, s.kind) for s in engine.named_state()]
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    assert sorted(found) == sorted((name, kind) for name in names for kind in kinds)
    for state in engine.named_state():
        assert state.tensor.shape == state.spec.local_shape(1), state.name


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
        sum(isinstance(module, FusedLayerNorm) for module in engine.model.modules())
        for engine in engines
    ]
    # Two in each of two layers, after the embedding, and at the end.
    assert norms == [0, 6]
    for want, got in zip(*results, strict=True):
        assert got.loss == pytest.approx(want.loss, rel=TOLERANCE)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=TOLERANCE)


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
