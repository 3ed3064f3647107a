"""Which engine a run takes, and whether it can be had."""

import importlib.util
from importlib.metadata import version

from megatron.config import Backend, Config
from megatron.engine.base import Engine
from megatron.engine.torch_engine import TorchEngine
from megatron.errors import ConfigError
from megatron.launch import Launch, RankEnvironment, export_for_deepspeed

_DEEPSPEED = "0.19"
"""The series whose inner workings megatron.engine.deepspeed knows."""


def check_engine(config: Config) -> None:
    """Whether the engine of ``config`` is installed; before any rank waits for another.

    Raises:
        ConfigError: if it is not, or is of another version.
    """
    if config.engine.name != "deepspeed":
        return
    found = version("deepspeed") if importlib.util.find_spec("deepspeed") else "none"
    if not found.startswith(f"{_DEEPSPEED}."):
        raise ConfigError(
            f"engine.name deepspeed needs the package deepspeed {_DEEPSPEED}, found {found}: "
            "pip install -c constraints.txt -e .[deepspeed]",
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

    return DeepSpeedEngine(config, launch.groups, launch.device, backend)
