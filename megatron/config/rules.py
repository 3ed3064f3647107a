"""The rules that the values of a config are checked by.

Each raises a ConfigError that names the option, its value and the rule.
"""

import math

from megatron.errors import ConfigError


def require(rule: bool, message: str) -> None:
    if not rule:
        raise ConfigError(message, on_every_rank=True)


def require_positive(section: str, **values: float) -> None:
    for name, value in values.items():
        require(
            0 < value < math.inf, f"{section}.{name} must be greater than 0 and finite, got {value}"
        )


def require_not_negative(section: str, **values: float) -> None:
    for name, value in values.items():
        require(value >= 0, f"{section}.{name} must not be negative, got {value}")


def require_below_one(section: str, **values: float) -> None:
    for name, value in values.items():
        require(0 <= value < 1, f"{section}.{name} must be at least 0 and below 1, got {value}")


def require_multiple(name: str, value: int, of_name: str, of: int) -> None:
    below = value - value % of
    nearest = f"{below} or {below + of}" if below > 0 else str(of)
    require(
        value % of == 0,
        f"{name} ({value}) must be a multiple of {of_name} ({of}), such as {nearest}",
    )
