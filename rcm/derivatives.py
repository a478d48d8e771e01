"""Directional derivatives of networks: the exact JVP, or a central difference.

Distillation in continuous time needs dF/dt along an ODE, or dF/ds in the end of a flow map. Losses
take the method as `derivative=`:

    exact_jvp              forward-mode automatic differentiation, exact in every precision
    one_pass_jvp           the same in a single pass, for losses that detach the derivative
    central_difference(h)  two more evaluations, for networks without a JVP

Most losses need F with a gradient, and its derivative without one. With exact_jvp they evaluate the
network twice, with one_pass_jvp once. In bfloat16 a central difference rounds badly whatever h is;
h = 0.03 is about the best.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from rcm.jvp_rules import JvpRules


class Derivative(Protocol):
    """(function, primals, tangents, scale) -> (value, scale · derivative along the tangents).

    function: tensors -> one tensor, (batch, ...) each; it may draw dropout masks.
    primals: its arguments. Those of shape (batch,) are TrigFlow times.
    tangents: one per primal, of its shape, per unit of time; zeros for an argument that is fixed.
    scale: (batch,), a factor of the derivative; None is 1.

    Both results carry gradients unless the caller disables them, and the derivative of one_pass_jvp
    never does. All evaluations draw the same dropout masks. Without gradients the random state is
    restored at the end, so that the pass with gradients that follows draws these masks again; with
    gradients it advances by one evaluation.
    """

    def __call__(
        self,
        function: Callable[..., Tensor],
        primals: tuple[Tensor, ...],
        tangents: tuple[Tensor, ...],
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


def exact_jvp(
    function: Callable[..., Tensor],
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The Derivative by torch.func.jvp.

    `scale` multiplies the tangents before differentiation (sCM, 2410.11081 §4.2, "JVP
    rearrangement"): dF/dt alone overflows in half precision where cos(t) sin(t) dF/dt does not.

    With gradients, PyTorch's layer_norm is replaced by one whose JVP has the right gradient, and
    norms of batch statistics raise NotImplementedError (rcm/norms.py). Rules for linear layers and
    other functions make it faster (rcm/jvp_rules.py).
    """
    with JvpRules():
        return _jvp(function, primals, tangents, scale)


def one_pass_jvp(
    function: Callable[..., Tensor],
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """exact_jvp whose value carries gradients, and whose derivative is detached.

    Losses that stop the gradient of the derivative then need no second evaluation of F. Blocks of
    the network that run through jvp_attn.checkpoint_primal keep only their inputs. Others also
    record parts of the graph of the tangent, which take memory until the end of the JVP.

    The gradient of the value is right with every normalisation of PyTorch. A student that overflows
    makes the gradient of a loss non-finite: a second pass could replace its sample by zeros.
    """
    with JvpRules(detached=True):
        value, derivative = _jvp(function, primals, tangents, scale)
    return value, derivative.detach()


def central_difference(h: float) -> Derivative:
    """The Derivative (F(+h) - F(-h)) / 2h along the tangents, in three evaluations of F.

    h is in units of time. Steps end where a time would leave [0, π/2], and their lengths are those
    of the times rounded to their dtype. The error is O(h²), or O(h) for a shortened step. Raises
    ValueError unless h is positive and finite.
    """
    if not 0 < h < math.inf:
        raise ValueError(f"h is {h}; the step of a central difference must be positive and finite")

    def derivative(
        function: Callable[..., Tensor],
        primals: tuple[Tensor, ...],
        tangents: tuple[Tensor, ...],
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        def moved(step: Tensor) -> Tensor:
            arguments = (
                (primal + _scaled(tangent, step)).to(primal.dtype)
                for primal, tangent in zip(primals, tangents, strict=True)
            )
            with restored_random_state(primals[0]):
                return function(*arguments)

        forward, back = _step(primals, tangents, h), _step(primals, tangents, -h)
        change = moved(forward) - moved(back)
        factor = 1 / (forward - back) if scale is None else scale / (forward - back)
        with _restored_without_gradients(primals[0]):
            value = function(*primals)
        return value, _scaled(change, factor).to(change.dtype)

    return derivative


def restored_random_state(like: Tensor) -> AbstractContextManager[None]:
    """Restore the random state of the CPU and of like's device on exit."""
    return torch.random.fork_rng(devices=[like.device] if like.is_cuda else [])


def _jvp(
    function: Callable[..., Tensor],
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    directions = tuple(
        _scaled(tangent, scale).to(primal.dtype)
        for primal, tangent in zip(primals, tangents, strict=True)
    )
    with _restored_without_gradients(primals[0]):
        value, derivative = torch.func.jvp(  # type: ignore[misc]
            function, primals, directions
        )
    return value, derivative


def _step(primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], h: float) -> Tensor:
    """The step h of each sample, (batch,) float64, after limiting and rounding its times."""
    step = torch.full((len(primals[0]),), h, dtype=torch.float64, device=primals[0].device)
    for primal, tangent in zip(primals, tangents, strict=True):
        if primal.ndim == 1:
            time, rate = primal.detach().double(), tangent.detach().double()
            moved = torch.clamp(time + step * rate, 0, math.pi / 2).to(primal.dtype)
            step = torch.where(rate == 0, step, (moved.double() - time) / rate)
    return step


def _scaled(tensor: Tensor, factor: Tensor | None) -> Tensor:
    """tensor (batch, ...) times factor (batch,), in float32 or more."""
    if factor is None:
        return tensor
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return factor.to(dtype).view(-1, *[1] * (tensor.ndim - 1)) * tensor


def _restored_without_gradients(like: Tensor) -> AbstractContextManager[None]:
    return nullcontext() if torch.is_grad_enabled() else restored_random_state(like)
