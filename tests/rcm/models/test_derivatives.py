"""Derivatives of the DiT along x, t and its end, with every option, against differences."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rcm.guidance import GuidedCondition
from rcm.models.dit import DiT
from rcm.models.modulation import AdaptiveLayerNorm
from tests.rcm.models.networks import OPTIONS, example, randomised, small_dit

with_each_option = pytest.mark.parametrize(
    "options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS]
)


def along(
    net: Callable[..., Tensor], tangents: tuple[bool, bool, bool]
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """F(x, t, end), a point, and a direction that moves the arguments with a tangent.

    A network with a guidance input gets a guidance.
    """
    x, t, labels, end = example()
    condition: Tensor | GuidedCondition = labels
    if getattr(net, "guidance", None) is not None:
        condition = GuidedCondition(labels, 1 + 4 * torch.rand_like(t), 0 * t, 1 + 0 * t)
    point = (x, t, end)
    direction = tuple(torch.randn_like(p) * moves for p, moves in zip(point, tangents, strict=True))
    return lambda x, t, end: net(x, t, condition, end=end), point, direction


def shifted(point: tuple[Tensor, ...], direction: tuple[Tensor, ...], h: float) -> list[Tensor]:
    return [p + h * d for p, d in zip(point, direction, strict=True)]


def difference_quotient(
    f: Callable[..., Tensor], point: tuple[Tensor, ...], direction: tuple[Tensor, ...]
) -> Tensor:
    """Of fourth order in h, because Fourier features have large higher derivatives."""
    h = 2e-6
    one, two = (
        f(*shifted(point, direction, n * h)) - f(*shifted(point, direction, -n * h)) for n in (1, 2)
    )
    return (8 * one - two) / (12 * h)


@with_each_option
@pytest.mark.parametrize(
    "moves",
    [(True, False, False), (False, True, False), (False, False, True), (True, True, True)],
    ids=["x", "t", "end", "all"],
)
def test_the_jvp_is_the_difference_quotient(
    options: dict[str, Any], moves: tuple[bool, bool, bool]
) -> None:
    f, point, direction = along(randomised(**options), moves)
    _, derivative = torch.func.jvp(f, point, direction)  # type: ignore[misc]
    quotient = difference_quotient(f, point, direction)
    assert derivative.norm() > 1e-2
    torch.testing.assert_close(derivative, quotient, atol=1e-7, rtol=1e-5)


def gradient_and_differences(net: DiT, weights: Tensor) -> tuple[Tensor, Tensor]:
    """d/dθ of Σ weights · dF/dend along a random direction of θ: by autograd, by differences."""
    f, point, direction = along(net, (False, False, True))
    parameters = [p for p in net.parameters() if p.requires_grad]
    steps = [torch.randn_like(p) for p in parameters]

    def value() -> Tensor:
        return (weights * torch.func.jvp(f, point, direction)[1]).sum()

    gradients = torch.autograd.grad(value(), parameters, allow_unused=True)
    pairs = zip(gradients, steps, strict=True)
    exact = torch.stack([(g * s).sum() for g, s in pairs if g is not None]).sum()
    h, values = 1e-5, []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.add_(step, alpha=sign * h)
            values.append(value())
    return exact, (values[0] - values[1]) / (2 * h)


@with_each_option
def test_the_gradient_through_the_jvp_in_the_end_is_the_difference(options: dict[str, Any]) -> None:
    """Terminal velocity matching trains through it."""
    exact, difference = gradient_and_differences(randomised(**options), torch.randn(3, 1, 8, 8))
    assert exact.abs() > 1e-2
    torch.testing.assert_close(exact, difference, atol=1e-6, rtol=1e-5)


@with_each_option
def test_derivatives_are_finite_and_train_the_end_from_its_zeros(options: dict[str, Any]) -> None:
    """Only the output layers are set, which starts F itself; all modulations are zero."""
    net = small_dit(**options)
    torch.nn.init.normal_(net.tokens_out.weight)
    torch.nn.init.normal_(net.modulation.linear.weight)
    exact, difference = gradient_and_differences(net, torch.randn(3, 1, 8, 8))
    assert exact.abs() > 1e-3
    torch.testing.assert_close(exact, difference, atol=1e-6, rtol=1e-4)


def test_the_layer_norm_has_a_second_derivative() -> None:
    """Forward over forward and reverse over forward; torch's own layer_norm has neither."""
    h, u, v, weights = torch.randn(4, 3, 16).double()
    norm, zero = AdaptiveLayerNorm(double_norm=False), torch.zeros(16).double()

    def layer_norm(h: Tensor) -> Tensor:
        normalised: Tensor = norm(h, zero, zero)
        return normalised

    def tangent(h: Tensor) -> Tensor:
        return (weights * torch.func.jvp(layer_norm, (h,), (u,))[1]).sum()

    difference = (tangent(h + 1e-5 * v) - tangent(h - 1e-5 * v)) / 2e-5
    _, forward = torch.func.jvp(tangent, (h,), (v,))  # type: ignore[misc]
    reverse = (torch.func.grad(tangent)(h) * v).sum()
    torch.testing.assert_close(forward, difference, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(reverse, difference, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(layer_norm(h), torch.nn.functional.layer_norm(h, (16,)))
    _, first = torch.func.jvp(layer_norm, (h,), (u,))  # type: ignore[misc]
    with torch.no_grad():
        _, fused = torch.func.jvp(layer_norm, (h,), (u,))  # type: ignore[misc]
    torch.testing.assert_close(first, fused)


def test_the_auxiliary_velocity_has_a_derivative_too() -> None:
    net = randomised(auxiliary_head=True)
    heads = net.heads
    assert heads is not None
    f, point, direction = along(lambda *args, **end: heads(*args, **end)[1], (True, True, True))
    _, derivative = torch.func.jvp(f, point, direction)  # type: ignore[misc]
    quotient = difference_quotient(f, point, direction)
    torch.testing.assert_close(derivative, quotient, atol=1e-7, rtol=1e-5)
