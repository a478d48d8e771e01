"""Presets: functions that return a config, by the name that a command uses."""

from collections.abc import Callable
from typing import Any

from rcm.presets.digits import digits
from rcm.training.config import RunConfig, updated

PRESETS: dict[str, Callable[[], RunConfig]] = {"digits": digits}
DEFAULT_PRESET = "digits"


def config_from_settings(settings: dict[str, Any]) -> RunConfig:
    """The config that a config.json describes.

    Raises:
        ValueError: its preset or a setting is unknown, or a setting is out of range.
        TypeError: a setting has a value of another type.
    """
    preset = settings.get("preset")
    if preset not in PRESETS:
        raise ValueError(f"the run's preset is {preset!r}; known are {', '.join(PRESETS)}")
    config: RunConfig = updated(PRESETS[preset](), settings)
    return config
