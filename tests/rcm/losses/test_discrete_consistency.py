"""Neighbouring points of a trajectory of the teacher have the same x̂0."""

import pytest
import torch
from torch import Tensor

from rcm.losses.discrete_consistency import discrete_consistency_loss, discrete_times
from rcm.ode import Solver, ode_step
from rcm.time_conversions import u_from_t
from rcm.trigflow import denoise, interpolate
from tests.rcm.analytic_networks import Gaussian, SmoothNetwork


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """x0, noise (6, 5), float64."""
    x0, noise = torch.randn(2, 6, 5, dtype=torch.float64)
    return x0, noise


@pytest.fixture
def grid() -> Tensor:
    """Times of two steps of six samples, float64."""
    start = torch.linspace(0.3, 1.5, 6, dtype=torch.float64)
    return torch.stack([start, start - 0.1, start - 0.2])


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ddim", 1), ("heun", 2)])
def test_error_of_the_exact_consistency_function_is_that_of_the_ode_steps(
    solver: Solver, order: int, gaussian: Gaussian, data: tuple[Tensor, Tensor]
) -> None:
    errors = []
    for steps in (20, 40, 80):
        fraction = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None]
        start = torch.linspace(0.6, 1.5, 6, dtype=torch.float64)
        loss = discrete_consistency_loss(
            gaussian.consistency,
            *data,
            start - 0.4 * fraction,
            None,
            teacher=gaussian.velocity,
            solver=solver,
        )
        errors.append(loss.value.sum().sqrt())
    assert errors[-1] < 0.02
    measured = torch.log2(torch.stack(errors[:-1]) / torch.stack(errors[1:]))
    torch.testing.assert_close(measured, torch.full_like(measured, order), atol=0.1, rtol=0)


def test_exact_consistency_function_minimises_the_loss_and_another_does_not(
    gaussian: Gaussian, data: tuple[Tensor, Tensor]
) -> None:
    start = torch.linspace(0.6, 1.5, 6, dtype=torch.float64)
    times = start - torch.linspace(0, 0.4, 2001, dtype=torch.float64)[:, None]
    offset = torch.zeros(5, dtype=torch.float64, requires_grad=True)

    def loss(wrong: float) -> Tensor:
        def student(x: Tensor, t: Tensor, condition: object) -> Tensor:
            return gaussian.consistency(x, t) + wrong * x + offset

        return discrete_consistency_loss(
            student, *data, times, None, teacher=gaussian.velocity, solver="heun"
        ).value

    exact, wrong = loss(0.0), loss(0.01)
    assert exact.max() < 1e-12
    assert wrong.min() > 1e-7
    (gradient,) = torch.autograd.grad(exact.sum(), offset)
    assert gradient.abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(wrong.sum(), offset)
    assert gradient.abs().max() > 1e-3


def test_loss_is_the_squared_difference_to_the_target_network(
    data: tuple[Tensor, Tensor], grid: Tensor
) -> None:
    student, teacher, target = (SmoothNetwork(5).double() for _ in range(3))
    x = interpolate(*data, grid[0])
    x_end = ode_step(teacher, x, grid[0], grid[1], None, "heun")
    x_end = ode_step(teacher, x_end, grid[1], grid[2], None, "heun")
    error = denoise(student, x, grid[0], None) - denoise(target, x_end, grid[2], None)
    for norm, expected in [("l2", error.square().sum(1)), ("rms", error.square().mean(1))]:
        loss = discrete_consistency_loss(
            student,
            *data,
            grid,
            None,
            teacher=teacher,
            target=target,
            solver="heun",
            norm=norm,  # type: ignore[arg-type]
        )
        torch.testing.assert_close(loss.value, expected)
        torch.testing.assert_close(loss.diagnostics["discrete_consistency"], expected)


def test_only_the_prediction_of_the_student_carries_gradients(
    data: tuple[Tensor, Tensor], grid: Tensor
) -> None:
    """The student as its own target has the gradient of a frozen copy as target."""
    student, copy, teacher = (SmoothNetwork(5).double() for _ in range(3))
    copy.load_state_dict(student.state_dict())
    own = discrete_consistency_loss(student, *data, grid, None, teacher=teacher)
    other = discrete_consistency_loss(student, *data, grid, None, teacher=teacher, target=copy)
    torch.testing.assert_close(own.value, other.value)
    gradients = [torch.autograd.grad(v.value.sum(), [*student.parameters()]) for v in (own, other)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
    other = discrete_consistency_loss(student, *data, grid, None, teacher=teacher, target=copy)
    other.value.sum().backward()
    assert all(p.grad is None for net in (copy, teacher) for p in net.parameters())


def test_target_at_time_zero_is_the_end_of_the_trajectory(
    gaussian: Gaussian, data: tuple[Tensor, Tensor]
) -> None:
    """Even if F of the student is NaN there: it divides by sin(t)."""

    def student(x: Tensor, t: Tensor, condition: object) -> Tensor:
        return (torch.cos(t)[:, None] * x - gaussian.ode_end(x, t)) / torch.sin(t)[:, None]

    times = torch.linspace(1.2, 0, 5, dtype=torch.float64)[:, None].expand(-1, 6)
    x = x_end = interpolate(*data, times[0])
    for i in range(4):
        x_end = ode_step(gaussian.velocity, x_end, times[i], times[i + 1], None)
    expected = (gaussian.ode_end(x, times[0]) - x_end).square().sum(1)
    loss = discrete_consistency_loss(student, *data, times, None, teacher=gaussian.velocity)
    torch.testing.assert_close(loss.value, expected)


def test_target_and_prediction_have_the_same_dropout_masks(data: tuple[Tensor, Tensor]) -> None:
    student = SmoothNetwork(5, dropout=0.5).double()
    start = torch.linspace(0.3, 1.5, 6, dtype=torch.float64)
    times = torch.stack([start, start - 1e-9])
    loss = discrete_consistency_loss(
        student, *data, times, None, teacher=lambda x, t, c: torch.zeros_like(x)
    )
    assert loss.value.max() < 1e-12


def test_nonfinite_samples_are_masked_and_counted(
    data: tuple[Tensor, Tensor], grid: Tensor
) -> None:
    """NaN in the data of sample 2 and in the teacher for sample 4."""
    student = SmoothNetwork(5).double()

    def teacher(x: Tensor, t: Tensor, condition: object) -> Tensor:
        return torch.where((t == grid[0, 4])[:, None], torch.nan, x)

    good = [0, 1, 3, 5]
    x0, noise = data
    clean = discrete_consistency_loss(
        student, x0[good], noise[good], grid[:, good], None, teacher=teacher
    )
    expected = torch.autograd.grad(clean.value.sum(), [*student.parameters()])
    x0[2, 3] = torch.nan
    loss = discrete_consistency_loss(student, x0, noise, grid, None, teacher=teacher)
    assert loss.diagnostics["nonfinite"].tolist() == [0, 0, 1, 0, 1, 0]
    assert loss.value[[2, 4]].tolist() == [0, 0]
    gradients = torch.autograd.grad(loss.value.sum(), [*student.parameters()])
    for one, two in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, two)


def test_a_nonfinite_prediction_is_masked_and_counted(
    data: tuple[Tensor, Tensor], grid: Tensor
) -> None:
    def student(x: Tensor, t: Tensor, condition: object) -> Tensor:
        return torch.where((t == grid[0, 1])[:, None], torch.inf, x)

    loss = discrete_consistency_loss(student, *data, grid, None, teacher=lambda x, t, c: x)
    assert loss.diagnostics["nonfinite"].tolist() == [0, 1, 0, 0, 0, 0]
    assert loss.value[1] == 0
    assert loss.value.isfinite().all()


@pytest.mark.parametrize("skip", [1, 5, 20])
def test_discrete_times_are_steps_of_a_shifted_uniform_grid(
    skip: int, generator: torch.Generator
) -> None:
    times = discrete_times(100_000, generator, steps=20, skip=skip, shift=3.0)
    assert times.shape == (skip + 1, 100_000)
    assert times.dtype == torch.float64
    assert times.min() >= 0
    assert times.max() <= torch.pi / 2
    assert (times[1:] < times[:-1]).all()
    u = u_from_t(times)
    unshifted = u / (3 - 2 * u)
    steps = unshifted[:-1] - unshifted[1:]
    torch.testing.assert_close(steps, torch.full_like(steps, 1 / 20))
    middle = (1 + skip / 20) / 2  # of the first time, which is uniform in (skip / 20, 1]
    assert abs(unshifted[0].mean() - middle) < 2e-3


def test_invalid_arguments_raise(data: tuple[Tensor, Tensor], grid: Tensor) -> None:
    net, generator = SmoothNetwork(5).double(), torch.Generator()
    x0, noise = data
    with pytest.raises(ValueError, match=r"times has shape \(6,\); expected .*\(k \+ 1, 6\)"):
        discrete_consistency_loss(net, x0, noise, grid[0], None, teacher=net)
    with pytest.raises(ValueError, match=r"times has shape \(1, 6\)"):
        discrete_consistency_loss(net, x0, noise, grid[:1], None, teacher=net)
    with pytest.raises(ValueError, match="one time per sample"):
        discrete_consistency_loss(net, x0, noise, grid[:, :5], None, teacher=net)
    with pytest.raises(ValueError, match="must decrease"):
        discrete_consistency_loss(net, x0, noise, grid.flip(0), None, teacher=net)
    with pytest.raises(ValueError, match="t lies in"):
        discrete_consistency_loss(net, x0, noise, grid + 1, None, teacher=net)
    with pytest.raises(ValueError, match="noise has shape"):
        discrete_consistency_loss(net, x0, noise[:, :4], grid, None, teacher=net)
    with pytest.raises(ValueError, match="solver is 'rk4'"):
        discrete_consistency_loss(net, x0, noise, grid, None, teacher=net, solver="rk4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'max' is unknown"):
        discrete_consistency_loss(net, x0, noise, grid, None, teacher=net, norm="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"skip is 49; it must be an integer in 1\.\.48"):
        discrete_times(4, generator, skip=49)
    with pytest.raises(ValueError, match="steps is 0"):
        discrete_times(4, generator, steps=0)
    with pytest.raises(ValueError, match="shift is 0"):
        discrete_times(4, generator, shift=0)
