"""Which backend a run takes, by rule, by measurement or from a save, without a GPU."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.config import Backend, Config
from megatron.errors import ConfigError
from megatron.model.attention import candidates
from megatron.tuning import attention as tuning
from megatron.tuning.attention import (
    AttentionChoice,
    choose_backend,
    measure,
)
from tests.distributed import run_ranks
from tests.megatron.training.sample import make_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NO_SAVE: dict[str, Any] = {}
ON_GPU: dict[str, Any] = {"attention_backend": "flex", "device": "cuda"}


def with_model(config: Config, **options: Any) -> Config:
    return replace(config, model=replace(config.model, **options))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path)


def no_timer(action: Callable[[], None]) -> float:
    raise AssertionError("nothing is to be measured")


class FakeGpu:
    """Stands for what is measured: each backend takes its own time, less with each call."""

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.running = ""

    def one_layer(self, config: Config, device: torch.device, backend: str) -> Callable[[], None]:
        def action() -> None:
            self.running = backend
            if backend not in self.milliseconds:
                raise RuntimeError(f"{backend} does not compile\nbecause it is not here")

        return action

    def timer(self, action: Callable[[], None]) -> float:
        action()
        self.milliseconds[self.running] *= 0.9
        return self.milliseconds[self.running]

    def choose(self, config: Config, saved: dict[str, Any] = NO_SAVE) -> AttentionChoice:
        """On one rank, or collective where there are more."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tuning, "_one_layer", self.one_layer)
            group = dist.group.WORLD
            return choose_backend(config, GPU, saved, group=group, timer=self.timer)


@pytest.mark.parametrize("backend", ["explicit", "blocked", "sdpa"])
def test_a_named_backend_is_taken(config: Config, backend: str) -> None:
    config = with_model(config, attention_backend=backend)
    found = choose_backend(config, CPU, ON_GPU, group=None, timer=no_timer)
    assert found == AttentionChoice(backend, "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("flex", CPU, "model.attention_backend flex needs a GPU; the device is cpu"),
        ("flash", CPU, "model.attention_backend flash needs a GPU; the device is cpu"),
        (
            "flash",
            GPU,
            "model.attention_backend flash needs the package flash-attn, which is not "
            "installed; the device is cuda",
        ),
    ],
)
def test_a_named_backend_that_cannot_be_used_is_refused(
    tmp_path: Path, backend: str, device: torch.device, message: str
) -> None:
    config = with_model(make_config(tmp_path, train={"dtype": "bf16"}), attention_backend=backend)
    with pytest.raises(ConfigError) as caught:
        choose_backend(config, device, NO_SAVE, group=None)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "options", [{}, {"attention_dropout": 0.1}, {"alibi_precision": "bloom_bf16"}]
)
def test_auto_on_a_cpu_is_blocked_without_a_measurement(
    config: Config, options: dict[str, Any]
) -> None:
    config = with_model(config, **options)
    for saved in (NO_SAVE, ON_GPU, {"attention_backend": "sdpa", "device": "cpu"}):
        found = choose_backend(config, CPU, saved, group=None, timer=no_timer)
        assert found == AttentionChoice("blocked", "cpu")


@pytest.mark.parametrize(
    ("options", "dtype", "want"),
    [
        ({}, "bf16", ["sdpa", "flex"]),
        ({}, "fp64", ["sdpa"]),
        ({"attention_dropout": 0.1}, "bf16", ["explicit", "blocked"]),
        ({"alibi_precision": "bloom_bf16"}, "bf16", ["explicit", "blocked"]),
        (
            {"alibi_precision": "bloom_bf16", "position_embedding": "rotary"},
            "fp32",
            ["sdpa", "flex"],
        ),
    ],
)
def test_auto_on_a_gpu_considers_what_can_do_the_work(
    tmp_path: Path, options: dict[str, Any], dtype: str, want: list[Backend]
) -> None:
    config = with_model(make_config(tmp_path, train={"dtype": dtype}), **options)
    assert candidates(config, GPU) == want


@pytest.mark.parametrize(
    ("dtype", "documents", "want"),
    [("bf16", False, True), ("fp32", False, False), ("bf16", True, False)],
)
def test_flash_is_considered_where_it_is_installed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    documents: bool,
    want: bool,
) -> None:
    monkeypatch.setattr("megatron.model.attention.runs_on", lambda backend, device: True)
    data = {"reset_attention_mask": documents, "tokenizer": tmp_path}
    config = make_config(tmp_path, train={"dtype": dtype}, data=data)
    assert ("flash" in candidates(config, GPU)) == want


@pytest.mark.parametrize("fastest", ["sdpa", "flex"])
def test_auto_on_a_gpu_takes_the_fastest_and_tells_why(
    config: Config, fastest: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="megatron")
    milliseconds = {"sdpa": 4.0, "flex": 4.0, fastest: 2.0}
    assert FakeGpu(**milliseconds).choose(config) == AttentionChoice(fastest, "cuda")
    # The least of ten times that get shorter.
    texts = [f"{name} {milliseconds[name] * 0.9**10:.3g} ms" for name in ("sdpa", "flex")]
    told = f"attention backend {fastest}: the fastest of {', '.join(texts)} a layer"
    assert caplog.messages == [told]


def test_a_backend_that_fails_is_left_out(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    assert FakeGpu(sdpa=9.0).choose(config).backend == "sdpa"
    assert caplog.messages[0] == "attention backend flex is left out: flex does not compile"


def test_auto_is_refused_where_nothing_works(config: Config) -> None:
    with pytest.raises(ConfigError, match="auto: none of sdpa, flex works on this device"):
        FakeGpu().choose(config)


def test_a_run_that_goes_on_keeps_the_choice_of_its_save(config: Config) -> None:
    found = choose_backend(config, GPU, ON_GPU, group=None, timer=no_timer)
    assert found == AttentionChoice("flex", "cuda")
    again = choose_backend(config, GPU, found.to_state(), group=None, timer=no_timer)
    assert again == found


@pytest.mark.parametrize(
    "saved",
    [
        {"attention_backend": "flex", "device": "cpu"},
        {"attention_backend": "flash", "device": "cuda"},
        {"attention_backend": "no such thing", "device": "cuda"},
        {"attention_backend": ["flex"], "device": "cuda"},
        {"step": 4},
    ],
)
def test_a_saved_choice_that_does_not_fit_is_made_anew(
    config: Config, saved: dict[str, Any]
) -> None:
    assert FakeGpu(sdpa=1.0, flex=2.0).choose(config, saved).backend == "sdpa"


def test_all_ranks_take_what_the_first_one_measured(config: Config) -> None:
    assert run_ranks(2, choose_on_rank, config) == [AttentionChoice("flex", "cuda")] * 2


def choose_on_rank(config: Config) -> AttentionChoice:
    first = dist.get_rank() == 0
    return FakeGpu(sdpa=2.0 if first else 1.0, flex=1.0 if first else 2.0).choose(config)


@pytest.mark.parametrize("position_embedding", ["alibi", "none"])
def test_what_is_measured_is_forward_and_backward_after_a_warm_up(
    tmp_path: Path, position_embedding: str
) -> None:
    data = {"reset_attention_mask": True, "tokenizer": tmp_path}
    config = with_model(make_config(tmp_path, data=data), position_embedding=position_embedding)
    clock = iter(range(30, 0, -1))

    def timer(action: Callable[[], None]) -> float:
        action()
        return float(next(clock))

    assert measure(config, CPU, ["explicit", "blocked", "sdpa"], timer) == {
        "explicit": 21.0,
        "blocked": 11.0,
        "sdpa": 1.0,
    }
