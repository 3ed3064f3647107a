"""The engine that a run asks for is there, or the run ends before any rank waits for another."""

from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from megatron.config import Config, EngineConfig, ParallelConfig
from megatron.engine import build
from megatron.engine.build import check_engine
from megatron.errors import ConfigError
from tests.megatron.training.sample import make_config

NVME = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "disk"}}}


def on_deepspeed(folder: Path) -> Config:
    config = make_config(folder)
    train = replace(config.train, dtype="fp32")
    engine = EngineConfig(name="deepspeed", deepspeed=NVME)
    return replace(config, engine=engine, train=train, parallel=ParallelConfig(zero=3))


def test_the_engine_torch_needs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "version", find_none)
    check_engine(make_config(tmp_path))


def test_missing_deepspeed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "version", find_none)
    with pytest.raises(ConfigError, match=r"deepspeed 0\.19, found none: pip install") as caught:
        check_engine(on_deepspeed(tmp_path))
    assert caught.value.on_every_rank


def find_none(name: str) -> str:
    raise PackageNotFoundError(name)


@pytest.mark.parametrize("found", ["0.18.4", "0.20.0", "0.190.0"])
def test_another_version_of_deepspeed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    monkeypatch.setattr(build, "version", lambda name: found)
    with pytest.raises(ConfigError, match=rf"deepspeed 0\.19, found {found}"):
        check_engine(on_deepspeed(tmp_path))


def test_what_has_to_be_compiled_needs_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "version", lambda name: "0.19.8")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"offload_optimizer\.device nvme: .* no compiler c\+\+"):
        check_engine(on_deepspeed(tmp_path))
