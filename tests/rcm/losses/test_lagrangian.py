"""The error e is zero where the end of the flow map follows the teacher's ODE."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rcm.derivatives import Derivative, central_difference, exact_jvp
from rcm.losses.lagrangian import lagrangian_error, lagrangian_flow_map_loss
from rcm.losses.loss import Loss, Norm
from rcm.time_sampling import LogNormal
from rcm.trigflow import Network, flow_map, interpolate
from tests.rcm.analytic_networks import Gaussian, SmoothNetwork, flow_map_errors, train

STOPPED = pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "unstopped"])
NORMS = pytest.mark.parametrize("norm", ["rms", "l2"])
DERIVATIVES = pytest.mark.parametrize(
    "derivative", [exact_jvp, central_difference(1e-4)], ids=["exact", "difference"]
)
Case = tuple[SmoothNetwork, SmoothNetwork, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def case() -> Case:
    """student, teacher, x0 and noise (6, 5), t and end (6,), in float64."""
    student, teacher = SmoothNetwork(5).double(), SmoothNetwork(5).double().requires_grad_(False)
    x0, noise = torch.randn(2, 6, 5, dtype=torch.float64)
    t = torch.linspace(0.1, 1.55, 6, dtype=torch.float64)
    share = torch.tensor([0.2, 0.9, 0.5, 0.7, 0.1, 0.4], dtype=torch.float64)
    return student, teacher, x0, noise, t, share * t


def value_of(case: Case, **options: Any) -> Tensor:
    student, teacher, x0, noise, t, end = case
    loss = lagrangian_flow_map_loss(student, x0, noise, t, end, None, teacher=teacher, **options)
    return loss.value


def test_error_is_the_difference_quotient_of_f_in_its_end_minus_the_teachers_velocity(
    case: Case,
) -> None:
    student, teacher, x, _, t, end = case
    error = lagrangian_error(student, teacher, x, t, end, None)
    later, earlier = (flow_map(student, x, t, end + h, None) for h in (1e-4, -1e-4))
    at_f = teacher(flow_map(student, x, t, end, None), end)
    torch.testing.assert_close(error.e, (later - earlier) / 2e-4 - at_f, atol=1e-7, rtol=0)
    torch.testing.assert_close(error.e, error.velocity_error - error.jvp)


def test_a_flow_map_that_ends_at_its_start_is_trained_by_flow_matching(case: Case) -> None:
    student, teacher, x, _, t, _ = case
    error = lagrangian_error(student, teacher, x, t, t, None)
    torch.testing.assert_close(error.e, student(x, t, None, t) - teacher(x, t))
    assert not error.jvp.any()


def test_warmup_scales_the_derivative_alone(case: Case) -> None:
    student, teacher, x, _, t, end = case
    error = lagrangian_error(student, teacher, x, t, end, None, warmup=0.3)
    whole = lagrangian_error(student, teacher, x, t, end, None)
    torch.testing.assert_close(error.jvp, whole.jvp)
    torch.testing.assert_close(error.e, whole.velocity_error - 0.3 * whole.jvp)


@STOPPED
@DERIVATIVES
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_exact_flow_map_is_a_fixed_point_and_another_map_is_not(
    gaussian: Gaussian, stopped: bool, derivative: Derivative, share: float
) -> None:
    x0, noise = torch.randn(2, 6, 5, dtype=torch.float64)
    t = torch.linspace(0.05, 1.5, 6, dtype=torch.float64)
    shift = torch.zeros(5, dtype=torch.float64, requires_grad=True)

    def gradient(shape: Gaussian) -> Tensor:
        loss = lagrangian_flow_map_loss(
            lambda x, t, c, end: shape.flow_map_network(x, t, c, end) + shift,
            x0,
            noise,
            t,
            share * t,
            None,
            teacher=gaussian.velocity,
            stopped=stopped,
            derivative=derivative,
        )
        return torch.autograd.grad(loss.value.sum(), shift)[0]

    # At end = 0 the difference is one-sided, and of first order.
    accuracy = 1e-10 if derivative is exact_jvp else 1e-6 if share else 1e-2
    assert gradient(gaussian).abs().max() < accuracy
    if share:  # at end = 0 the maps of all Gaussians have the same velocity, 0
        assert gradient(Gaussian(std=0.5)).abs().max() > 2e-2
        assert gradient(Gaussian(mean=0.8)).abs().max() > 2e-2


@pytest.mark.parametrize(("norm", "elements"), [("rms", 5), ("l2", 1)])
def test_stopped_gradient_with_respect_to_f_is_twice_the_normalised_error(
    case: Case, norm: Norm, elements: int
) -> None:
    _, teacher, x0, noise, t, end = case
    f = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)

    def student(x: Tensor, t: Tensor, condition: object, end: Tensor) -> Tensor:
        return f + torch.cos(3 * end)[:, None] * x

    case = (student, *case[1:])  # type: ignore[assignment]
    value_of(case, tangent_norm=norm).sum().backward()
    with torch.no_grad():
        e = lagrangian_error(student, teacher, interpolate(x0, noise, t), t, end, None).e
    size = e.norm(dim=1, keepdim=True) / elements**0.5
    torch.testing.assert_close(f.grad, 2 * e / (size + 0.1) / elements)


@NORMS
@DERIVATIVES
def test_unstopped_gradient_is_the_finite_difference_of_the_loss(
    case: Case, norm: Norm, derivative: Derivative
) -> None:
    """It passes through f, dF/ds and the teacher's input: each parameter moves by ± 1e-5."""
    student = case[0]

    def loss() -> Tensor:
        return value_of(case, stopped=False, tangent_norm=norm, derivative=derivative).sum()

    gradients = torch.autograd.grad(loss(), student.parameters())
    for parameter, gradient in zip(student.parameters(), gradients, strict=True):
        for i in torch.randperm(parameter.numel())[:5].tolist():
            element = parameter.data.view(-1)[i : i + 1]
            start, ends = element.clone(), []
            for h in (1e-5, -1e-5):
                element.copy_(start + h)
                ends.append(loss().item())
            element.copy_(start)
            quotient = (ends[0] - ends[1]) / 2e-5
            assert gradient.view(-1)[i].item() == pytest.approx(quotient, abs=1e-7, rel=1e-6)


@NORMS
def test_unstopped_value_is_the_squared_error(case: Case, norm: Norm) -> None:
    student, teacher, x0, noise, t, end = case
    x = interpolate(x0, noise, t)
    e = lagrangian_error(student, teacher, x, t, end, None, warmup=0.3).e
    expected = e.square().sum(1) / (5 if norm == "rms" else 1)
    value = value_of(case, stopped=False, warmup=0.3, tangent_norm=norm)
    torch.testing.assert_close(value, expected)


@STOPPED
def test_only_the_student_gets_gradients(case: Case, stopped: bool) -> None:
    student, teacher = case[:2]
    value_of(case, stopped=stopped).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@STOPPED
def test_the_derivative_is_an_option(case: Case, stopped: bool) -> None:
    student = case[0]
    gradients = []
    for derivative in (exact_jvp, central_difference(1e-4)):
        value = value_of(case, stopped=stopped, derivative=derivative).sum()
        gradients.append(torch.autograd.grad(value, student.parameters()))
    for exact, difference in zip(*gradients, strict=True):
        torch.testing.assert_close(difference, exact, atol=1e-6, rtol=1e-6)
        assert not torch.equal(difference, exact)


@DERIVATIVES
def test_both_passes_of_the_stopped_loss_see_the_same_dropout_masks(derivative: Derivative) -> None:
    net = SmoothNetwork(5, width=256, dropout=0.5)
    x0, noise, t = torch.randn(6, 5), torch.randn(6, 5), torch.linspace(0.1, 1.5, 6)
    outputs = []

    def student(x: Tensor, t: Tensor, condition: object, end: Tensor) -> Tensor:
        f = net(x, t, condition, end)
        if torch.is_grad_enabled():
            outputs.append(f.detach())
        return f

    def recorded(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        value, d = derivative(*args, **options)
        outputs.append(value)
        return value, d

    lagrangian_flow_map_loss(
        student, x0, noise, t, t / 2, None, teacher=lambda x, t, c: x, derivative=recorded
    )
    of_the_error, of_the_loss = outputs
    torch.testing.assert_close(of_the_error, of_the_loss)


def nan_in_the_middle(x: Tensor, t: Tensor, condition: object) -> Tensor:
    """A teacher that fails at 0.25 < t < 0.35, with a NaN derivative in x too."""
    broken = (t > 0.25) & (t < 0.35)
    return x * torch.where(broken, float("nan"), 1.0)[:, None]


@DERIVATIVES
@pytest.mark.parametrize(
    ("stopped", "cause"),
    [(s, c) for s in (True, False) for c in ("data", "teacher")] + [(True, "student")],
)
def test_a_sample_with_nan_is_masked_and_counted(
    stopped: bool, derivative: Derivative, cause: str
) -> None:
    net = SmoothNetwork(5)
    x0, noise, t = torch.randn(6, 5), torch.randn(6, 5), torch.linspace(0.1, 1.1, 6)
    end = t / 2
    end[2] = 0.3

    def student(x: Tensor, t: Tensor, condition: object, end: Tensor) -> Tensor:
        return net(torch.where(x > 1e6, float("nan"), x), t, condition, end)

    def loss_of(samples: Tensor, teacher: Network) -> Loss:
        loss = lagrangian_flow_map_loss(
            student,
            x0[samples],
            noise[samples],
            t[samples],
            end[samples],
            None,
            teacher=teacher,
            stopped=stopped,
            derivative=derivative,
        )
        net.zero_grad()
        loss.value.sum().backward()
        return loss

    loss_of(torch.tensor([0, 1, 3, 4, 5]), lambda x, t, c: x)
    expected = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
    if cause != "teacher":
        x0[2, 3] = float("nan") if cause == "data" else 1e7
    loss = loss_of(torch.arange(6), nan_in_the_middle if cause == "teacher" else lambda x, t, c: x)
    assert loss.diagnostics["nonfinite"].tolist() == [0, 0, 1, 0, 0, 0]
    assert loss.value[2] == 0
    assert all(d.isfinite().all() for d in loss.diagnostics.values())
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@STOPPED
def test_distilling_a_flow_map_gives_the_closed_form_in_any_number_of_steps(
    gaussian: Gaussian, generator: torch.Generator, stopped: bool
) -> None:
    student = SmoothNetwork(1, width=64)
    draw = LogNormal(mean=0.0, std=1.6)

    def loss(step: int) -> Loss:
        z, noise = torch.randn(2, 128, 1, generator=generator)
        t = draw(128, generator)
        return lagrangian_flow_map_loss(
            student,
            gaussian.mean + gaussian.std * z,
            noise,
            t,
            t * torch.clamp(1.5 * torch.rand(128, generator=generator) - 0.25, 0, 1),
            None,
            teacher=gaussian.velocity,
            stopped=stopped,
            warmup=min(1.0, step / 100),
        )

    train(student, 500, loss)
    errors = flow_map_errors(student, gaussian, generator)
    for steps, bound in ((1, 0.12), (2, 0.06), (4, 0.06)):
        assert errors[steps] < bound


def test_invalid_arguments_raise(case: Case) -> None:
    student, teacher, x, _, t, end = case

    def loss(noise: Tensor = x, t: Tensor = t, end: Tensor = end, **options: Any) -> None:
        lagrangian_flow_map_loss(student, x, noise, t, end, None, teacher=teacher, **options)

    with pytest.raises(ValueError, match="noise has shape"):
        loss(noise=x[:, :4])
    with pytest.raises(ValueError, match="t lies in"):
        loss(t=t + 1)
    with pytest.raises(ValueError, match="end has shape"):
        loss(end=end[:3])
    with pytest.raises(ValueError, match=r"max\(end - t\) is 0.1"):
        loss(end=t + 0.1)
    with pytest.raises(ValueError, match="'max' is unknown"):
        loss(tangent_norm="max")
    with pytest.raises(ValueError, match="tangent_norm_eps is 0"):
        loss(tangent_norm_eps=0)
    with pytest.raises(ValueError, match=r"warmup is 1.5; it must lie in \[0, 1\]"):
        loss(warmup=1.5)
