"""Presets: functions that return the config of a method, by the name that a command uses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from rcm.presets.from_scratch import FROM_SCRATCH, FromScratch
from rcm.presets.pretrained import PRETRAINED, Pretrained
from rcm.training.config import RunConfig, updated
from rcm.training.method import Distillation


@dataclass(frozen=True)
class Preset:
    """Data, model and teacher of a preset, and the methods that it has settings for."""

    config: Callable[[str], RunConfig]
    """method -> config; a name from `methods`."""
    methods: Mapping[str, Distillation]
    default_method: str


_ALL: dict[str, FromScratch | Pretrained] = {**FROM_SCRATCH, **PRETRAINED}
PRESETS = {
    name: Preset(partial(preset.config, name), preset.methods, preset.default_method)
    for name, preset in _ALL.items()
}
DEFAULT_PRESET = "digits"


def config_from_settings(settings: dict[str, Any]) -> RunConfig:
    """The config that a config.json describes.

    Raises:
        ValueError: its preset, method or a setting is unknown, or a setting is out of range.
        TypeError: a setting has a value of another type.
    """
    name, method = str(settings.get("preset")), str(settings.get("method"))
    if name not in PRESETS:
        raise ValueError(f"the run's preset is {name!r}; known are {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if method not in preset.methods:
        raise ValueError(f"the run's method is {method!r}; known are {', '.join(preset.methods)}")
    config: RunConfig = updated(preset.config(method), settings)
    return config
