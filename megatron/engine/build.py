"""Which engine a run takes, and whether it can be had."""

import shutil
from importlib.metadata import PackageNotFoundError, version

from megatron.config import Backend, Config, nvme_options
from megatron.engine.base import Engine
from megatron.engine.torch_engine import TorchEngine
from megatron.environment import RankEnvironment, export_for_deepspeed
from megatron.errors import ConfigError
from megatron.launch import Launch
from megatron.peers import set_timeout, watched

_DEEPSPEED = "0.19"
"""The series whose inner workings megatron.engine.deepspeed knows."""


def check_engine(config: Config) -> None:
    """Whether this machine has what the engine of ``config`` needs; before any rank waits.

    Raises:
        ConfigError: if DeepSpeed is not installed, is of another version, or would want to compile
            and cannot.
    """
    if config.engine.name != "deepspeed":
        return
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        found = "none"
    if not found.startswith(f"{_DEEPSPEED}."):
        raise ConfigError(
            f"engine.name deepspeed needs the package deepspeed {_DEEPSPEED}, found {found}: "
            "pip install -c constraints.txt -e .[deepspeed]",
            on_every_rank=True,
        )
    for option in nvme_options(config.engine):
        if shutil.which("c++") is None:
            raise ConfigError(
                f"{option} nvme: DeepSpeed compiles its access to files when it is first used, and "
                "finds no compiler c++ (Debian: apt-get install g++)",
                on_every_rank=True,
            )


def build_engine(
    config: Config, launch: Launch, environment: RankEnvironment, backend: Backend
) -> Engine:
    """The engine that ``config`` names. Collective.

    Raises:
        ConfigError: for an option that the engine, the device or the installation cannot do.
    """
    if config.engine.name == "torch":
        return TorchEngine(config, launch.groups, launch.device, backend)
    export_for_deepspeed(environment, launch.device)
    # DeepSpeed is optional, and takes seconds to import.
    from megatron.engine.deepspeed.engine import DeepSpeedEngine

    # DeepSpeed builds groups of its own, which have torch's timeout, and may have to compile first.
    seconds = max(config.launch.startup_timeout, config.launch.timeout)
    complaint = f"not all ranks built their engine within {seconds:g} s"
    with watched(seconds, complaint, launch.spokesman):
        engine = DeepSpeedEngine(config, launch.groups, launch.device, backend)
    set_timeout(config.launch.timeout)
    return engine
