"""One step along the probability-flow ODE dx/dt = F(x, t), in TrigFlow time.

    euler   x' = x + (t' - t) F(x, t)                                   first order
    ddim    x' = cos(t - t') x - sin(t - t') F(x, t)                    first order (2010.02502)
    heun    x' = x + (t' - t)/2 (F(x, t) + F(x + (t' - t) F(x, t), t')) second order

DDIM holds the network's x̂0 and ẑ constant during the step: it is exact where they are. A step to
t' = 0 is then the denoiser. Samplers and losses that need a trajectory of a teacher call ode_step
repeatedly.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rcm.trigflow import Network, check_times, cos_sin, network_time
from rcm.validation import require_choice

Solver = Literal["euler", "ddim", "heun"]


def ode_step(
    net: Network, x: Tensor, t: Tensor, t_next: Tensor, condition: Any, solver: Solver = "euler"
) -> Tensor:
    """Move x from t to t_next along the ODE of a network, with or without guidance.

    x: (batch, ...); t, t_next: (batch,), preferably float64. t_next above t adds noise: the ODE
    runs in both directions. "euler" and "ddim" evaluate the network once, at t; "heun" also at
    t_next, so that a step to 0 needs a network that is valid there. Gradients flow through all
    evaluations; use torch.no_grad for a teacher. Returns (batch, ...) in the dtype of x. Raises
    ValueError for an unknown solver and for bad times.
    """
    require_choice(get_args(Solver), solver=solver)
    check_times(t, x.shape[0])
    check_times(t_next, x.shape[0])
    f = net(x, network_time(t, x), condition)
    if solver == "ddim":
        cos, sin = cos_sin(t - t_next, x)
        return (cos * x - sin * f).to(x.dtype)
    dtype = torch.promote_types(x.dtype, torch.float32)
    dt = (t_next - t).to(dtype).view(-1, *[1] * (x.ndim - 1))
    euler = (x + dt * f).to(x.dtype)
    if solver == "euler":
        return euler
    f_next = net(euler, network_time(t_next, x), condition)
    return (x + dt / 2 * (f + f_next)).to(x.dtype)
