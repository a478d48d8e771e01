"""Classifier-free guidance (2207.12598) of a TrigFlow network."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rcm.trigflow import Network


def guided(net: Network, null_condition: Callable[[Any], Any], scale: float) -> Network:
    """Classifier-free guidance (2207.12598): F_u + w (F_c - F_u); w = 1 is no guidance.

    null_condition maps a batch's condition to the empty (or negative) condition of that batch.
    """

    def wrapped(x: Tensor, t: Tensor, condition: Any) -> Tensor:
        unconditional = net(x, t, null_condition(condition))
        return unconditional + scale * (net(x, t, condition) - unconditional)

    return wrapped
