"""Keeping torch's autocast out of the attention maps: it would round in the middle of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from jvp_attn.types import Inputs

Map = TypeVar("Map", bound=Callable[..., Any])


@torch.compiler.assume_constant_result
def has_autocast(device_type: str) -> bool:
    """Whether there is autocast for a type of device, such as "cpu"; there is none for "meta"."""
    return torch.amp.is_autocast_available(device_type)


def without_autocast(attention_map: Map) -> Map:
    """Let a function of `Inputs` compute as if there were no autocast around it."""

    @wraps(attention_map)
    def in_full_precision(inputs: Inputs, *others: Any) -> Any:
        device = inputs.q.device.type
        if not has_autocast(device):
            return attention_map(inputs, *others)
        with torch.autocast(device, enabled=False):
            return attention_map(inputs, *others)

    return cast(Map, in_full_precision)
