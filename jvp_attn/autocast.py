"""Disabling torch's autocast inside attention, where it would round intermediate results."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from jvp_attn.types import Inputs

F = TypeVar("F", bound=Callable[..., Any])


@torch.compiler.assume_constant_result
def has_autocast(device_type: str) -> bool:
    """Whether a type of device has autocast: "cpu" does, "meta" does not."""
    return torch.amp.is_autocast_available(device_type)


def without_autocast(function: F) -> F:
    """Disable autocast inside a function of `Inputs`."""

    @wraps(function)
    def in_full_precision(inputs: Inputs, *others: Any) -> Any:
        device = inputs.q.device.type
        if not has_autocast(device):
            return function(inputs, *others)
        with torch.autocast(device, enabled=False):
            return function(inputs, *others)

    return cast(F, in_full_precision)
