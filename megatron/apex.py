"""The two parts of NVIDIA's apex that can be asked for: FusedLayerNorm and FusedAdam.

Apex is built from source and never required. The package called ``apex`` on PyPI is another one.
"""

import importlib
from typing import Any

from megatron.errors import ConfigError


def fused_layer_norm() -> type[Any]:
    """The class ``apex.normalization.FusedLayerNorm``.

    Raises:
        ConfigError: if NVIDIA's apex cannot be imported.
    """
    return _load("apex.normalization", "FusedLayerNorm", option="model.layernorm apex")


def fused_adam() -> type[Any]:
    """The class ``apex.optimizers.FusedAdam``.

    Raises:
        ConfigError: if NVIDIA's apex cannot be imported.
    """
    return _load("apex.optimizers", "FusedAdam", option="optimizer.name apex_adamw")


def _load(module: str, name: str, option: str) -> type[Any]:
    try:
        found: type[Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{option} needs NVIDIA's apex, built from source (the package apex of PyPI is "
            f"another one): {error}"
        ) from error
    return found
