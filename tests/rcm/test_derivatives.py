"""Both derivatives are d/dt of F along a direction; all their evaluations draw the same dropout."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rcm.derivatives import Derivative, central_difference, exact_jvp
from tests.rcm.analytic_networks import SmoothNetwork

BOTH = pytest.mark.parametrize(
    "derivative", [exact_jvp, central_difference(1e-4)], ids=["exact", "difference"]
)
Case = tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]


@pytest.fixture
def case() -> Case:
    """F(x, t, end) of a smooth network, and a direction in which x and t move, in float64."""
    net = SmoothNetwork(5).double()
    x, direction = torch.randn(2, 6, 5, dtype=torch.float64)
    t = torch.linspace(0.1, 1.5, 6, dtype=torch.float64)
    primals, tangents = (x, t, t / 3), (direction, torch.ones_like(t), torch.zeros_like(t))
    return lambda x, t, end: net(x, t, end=end), primals, tangents


def along(primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], h: float) -> list[Tensor]:
    return [primal + h * tangent for primal, tangent in zip(primals, tangents, strict=True)]


@BOTH
def test_derivative_is_the_richardson_extrapolation_of_differences(
    derivative: Derivative, case: Case
) -> None:
    function, primals, tangents = case
    value, d = derivative(function, primals, tangents)

    def quotient(h: float) -> Tensor:
        ahead, behind = (function(*along(primals, tangents, s * h)) for s in (1, -1))
        return (ahead - behind) / (2 * h)

    torch.testing.assert_close(value, function(*primals))
    torch.testing.assert_close(d, (4 * quotient(1e-3) - quotient(2e-3)) / 3, atol=3e-8, rtol=0)


@BOTH
def test_scale_multiplies_the_derivative_and_not_the_value(
    derivative: Derivative, case: Case
) -> None:
    scale = torch.linspace(0, 2, 6, dtype=torch.float64)
    value, d = derivative(*case)
    scaled_value, scaled = derivative(*case, scale=scale)
    torch.testing.assert_close(scaled_value, value)
    torch.testing.assert_close(scaled, scale[:, None] * d)


@BOTH
@pytest.mark.parametrize("moving", [0, 1, 2])
def test_each_argument_may_move_alone(derivative: Derivative, case: Case, moving: int) -> None:
    function, primals, _ = case
    tangents = tuple(torch.full_like(p, 0.5 * (i == moving)) for i, p in enumerate(primals))
    _, d = derivative(function, primals, tangents)
    ahead, behind = (function(*along(primals, tangents, h)) for h in (1e-4, -1e-4))
    torch.testing.assert_close(d, (ahead - behind) / 2e-4, atol=1e-8, rtol=1e-6)
    assert d.abs().max() > 1e-3


def test_central_difference_is_of_second_order(case: Case) -> None:
    _, exact = exact_jvp(*case)
    errors = torch.stack(
        [(central_difference(h)(*case)[1] - exact).abs().max() for h in (0.04, 0.02, 0.01)]
    )
    order = torch.log2(errors[:-1] / errors[1:])
    torch.testing.assert_close(order, torch.full((2,), 2.0).double(), atol=0.1, rtol=0)


@pytest.mark.parametrize("scale", [None, torch.ones(4, dtype=torch.float64)])
def test_differences_stay_within_the_times_of_trigflow(scale: Tensor | None) -> None:
    """At t = 0 and t = π/2 they are one-sided; a quadratic then shows half the step."""
    t = torch.tensor([0.0, 0.004, 0.8, torch.pi / 2], dtype=torch.float64)
    seen = []

    def quadratic(t: Tensor) -> Tensor:
        seen.append(t)
        return t**2

    _, d = central_difference(0.01)(quadratic, (t,), (torch.ones_like(t),), scale)
    torch.testing.assert_close(
        d - 2 * t, torch.tensor([0.01, 0.006, 0.0, -0.01], dtype=torch.float64)
    )
    assert torch.stack(seen).min() == 0
    assert torch.stack(seen).max() <= torch.pi / 2


def test_differences_divide_by_the_rounded_step() -> None:
    """float32 numbers near 1.2 differ by 1.2e-7: t ± 1e-5 has a step that is 1 % off."""
    t = torch.full((1000,), 1.2) + torch.linspace(0, 0.1, 1000)
    _, d = central_difference(1e-5)(lambda t: t, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(d, torch.ones_like(t), atol=1e-6, rtol=0)


@BOTH
def test_value_and_derivative_carry_gradients(derivative: Derivative) -> None:
    """d/dw of w³ t² and of its time derivative 2 w³ t."""
    w = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.3, 0.9], dtype=torch.float64)
    value, d = derivative(lambda t: w**3 * t**2, (t,), (torch.ones_like(t),))
    (of_value,) = torch.autograd.grad(value.sum(), w, retain_graph=True)
    (of_derivative,) = torch.autograd.grad(d.sum(), w)
    torch.testing.assert_close(of_value, 3 * w.detach() ** 2 * (t**2).sum())
    torch.testing.assert_close(of_derivative, 3 * w.detach() ** 2 * (2 * t).sum())
    with torch.no_grad():
        value, d = derivative(lambda t: w**3 * t**2, (t,), (torch.ones_like(t),))
    assert not value.requires_grad
    assert not d.requires_grad


@BOTH
def test_all_evaluations_draw_the_same_dropout_masks(derivative: Derivative) -> None:
    net = SmoothNetwork(5, width=256, dropout=0.5).double()
    x, t = torch.randn(6, 5, dtype=torch.float64), torch.linspace(0.1, 1.5, 6).double()
    case = net, (x, t), (torch.randn_like(x), torch.ones_like(t))
    state = torch.get_rng_state()
    with torch.no_grad():
        value, d = derivative(*case)
    torch.testing.assert_close(net(x, t), value)
    torch.set_rng_state(state)
    _, exact = exact_jvp(*case)
    torch.testing.assert_close(d, exact.detach(), atol=1e-6, rtol=0)


@BOTH
def test_with_gradients_the_random_state_advances_by_one_evaluation(
    derivative: Derivative,
) -> None:
    net = SmoothNetwork(5, dropout=0.5)
    x, t = torch.randn(6, 5), torch.linspace(0.1, 1.5, 6)
    state = torch.get_rng_state()
    net(x, t)
    after_one = torch.get_rng_state()
    torch.set_rng_state(state)
    derivative(net, (x, t), (torch.zeros_like(x), torch.ones_like(t)))
    assert torch.equal(torch.get_rng_state(), after_one)


@BOTH
def test_bfloat16_arguments_keep_their_dtype(derivative: Derivative) -> None:
    def function(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16
        assert t.dtype == torch.float32
        return x * torch.cos(t)[:, None].to(x.dtype)

    x, t = torch.ones(3, 2, dtype=torch.bfloat16), torch.linspace(0.1, 1.5, 3)
    scale = torch.ones(3, dtype=torch.float64)
    value, d = derivative(function, (x, t), (torch.ones(3, 2), torch.ones(3)), scale)
    assert value.dtype == d.dtype == torch.bfloat16


@pytest.mark.parametrize("h", [0.0, -1e-3, float("nan"), float("inf")])
def test_a_step_that_is_not_positive_raises(h: float) -> None:
    with pytest.raises(ValueError, match="must be positive and finite"):
        central_difference(h)
