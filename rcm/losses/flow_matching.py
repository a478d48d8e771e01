"""Flow matching in TrigFlow: regress F to the velocity of the path (sCM, 2410.11081 §3).

L = mean over elements of (F(x, t) - (cos(t) z - sin(t) x0))²,    x = cos(t) x0 + sin(t) z
"""

from typing import Any

from torch import Tensor

from rcm.losses.loss import Loss, Norm, squared_norm
from rcm.trigflow import Network, check_like, check_times, interpolate, network_time, velocity


def flow_matching_loss(
    net: Network,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    condition: Any,
    *,
    norm: Norm = "rms",
) -> Loss:
    """Train a teacher on data, or a critic (the "fake score") on the student's samples.

    x0, noise: (batch, ...) in units of σd; t: (batch,). norm: "rms" averages over the elements of a
    sample, "l2" sums. Raises ValueError for unequal shapes, times outside [0, π/2] and an unknown
    norm.
    """
    check_times(t, x0.shape[0])
    check_like("noise", noise, "x0", x0)
    x = interpolate(x0, noise, t)
    error = net(x, network_time(t, x), condition) - velocity(x0, noise, t)
    value = squared_norm(error, norm)
    return Loss(value, {"flow_matching": value.detach()})
