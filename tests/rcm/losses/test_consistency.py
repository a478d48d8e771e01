"""The tangent is the derivative of f along the ODE; the loss moves F along the tangent."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rcm.derivatives import Derivative, central_difference, exact_jvp
from rcm.losses.consistency import (
    Form,
    consistency_loss,
    consistency_tangent,
    jvp_cosine,
    normalize_tangent,
)
from rcm.losses.loss import Loss, Norm, sample_norm
from rcm.time_sampling import LogNormal
from rcm.trigflow import Network, denoise, interpolate, velocity
from tests.rcm.analytic_networks import Gaussian, SmoothNetwork, flow_map_errors, train

FORMS = pytest.mark.parametrize("form", ["scm", "rcm"])
DERIVATIVES = pytest.mark.parametrize(
    "derivative", [exact_jvp, central_difference(1e-4)], ids=["exact", "difference"]
)
SHARES = pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=lambda share: f"end={share}t")


def along_the_ode(teacher: Network, x: Tensor, t: Tensor, dt: float) -> Tensor:
    """One Runge-Kutta step of fourth order."""
    k1 = teacher(x, t, None)
    k2 = teacher(x + dt / 2 * k1, t + dt / 2, None)
    k3 = teacher(x + dt / 2 * k2, t + dt / 2, None)
    k4 = teacher(x + dt * k3, t + dt, None)
    return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@pytest.fixture
def case() -> tuple[SmoothNetwork, SmoothNetwork, Tensor, Tensor]:
    """student, teacher, x (6, 5), t (6,), in float64."""
    t = torch.linspace(0.02, 1.55, 6, dtype=torch.float64)
    networks = SmoothNetwork(5).double(), SmoothNetwork(5).double()
    return *networks, torch.randn(6, 5, dtype=torch.float64), t


def test_tangent_is_the_difference_quotient_of_f_along_the_teachers_ode(case) -> None:  # type: ignore[no-untyped-def]
    student, teacher, x, t = case
    tangent = consistency_tangent(student, x, t, teacher(x, t).detach(), None)
    h = 1e-4
    ahead = denoise(student, along_the_ode(teacher, x, t, h), t + h, None)
    behind = denoise(student, along_the_ode(teacher, x, t, -h), t - h, None)
    quotient = torch.cos(t)[:, None] * (ahead - behind) / (2 * h)
    torch.testing.assert_close(tangent.g, quotient, atol=1e-7, rtol=1e-7)


@SHARES
def test_tangent_of_a_flow_map_is_its_difference_quotient_at_a_fixed_end(
    case, share: float
) -> None:  # type: ignore[no-untyped-def]
    student, teacher, x, t = case
    end, h = share * t, 1e-4
    tangent = consistency_tangent(student, x, t, teacher(x, t).detach(), None, end=end)
    ahead, behind = (  # without flow_map, which refuses the end = t of t - h
        torch.cos(t + s - end)[:, None] * along_the_ode(teacher, x, t, s)
        - torch.sin(t + s - end)[:, None]
        * student(along_the_ode(teacher, x, t, s), t + s, None, end)
        for s in (h, -h)
    )
    quotient = torch.cos(t - end)[:, None] * (ahead - behind) / (2 * h)
    torch.testing.assert_close(tangent.g, quotient, atol=1e-7, rtol=1e-7)


@FORMS
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
def test_a_flow_map_that_ends_at_its_start_is_trained_by_flow_matching(
    case,  # type: ignore[no-untyped-def]
    form: Form,
    warmup: float,
) -> None:
    student, teacher, x, t = case
    v = teacher(x, t).detach()
    tangent = consistency_tangent(student, x, t, v, None, end=t, form=form, warmup=warmup)
    torch.testing.assert_close(tangent.g, v - student(x, t, None, t).detach())
    assert not tangent.jvp.any()


@FORMS
def test_a_flow_map_that_ends_at_zero_is_trained_by_the_loss_of_one_time(case, form: Form) -> None:  # type: ignore[no-untyped-def]
    """Values, diagnostics and gradients are equal to the last bit."""
    student, teacher, x0, t = case
    noise, zero = torch.randn_like(x0), torch.zeros_like(t)

    def one_time(x: Tensor, t: Tensor, condition: object) -> Tensor:
        return student(x, t, condition, zero)

    results = []
    for net, end in ((student, zero), (one_time, None)):
        loss = consistency_loss(
            net, x0, noise, t, None, end=end, teacher=teacher, form=form, warmup=0.3
        )
        gradients = torch.autograd.grad(loss.value.sum(), student.parameters())
        results.append([loss.value, *loss.diagnostics.values(), *gradients])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@SHARES
@FORMS
@DERIVATIVES
def test_the_exact_flow_map_is_a_fixed_point_and_another_map_is_not(
    gaussian: Gaussian, share: float, form: Form, derivative: Derivative
) -> None:
    x0, noise = torch.randn(2, 6, 5, dtype=torch.float64)
    t = torch.linspace(0.05, 1.5, 6, dtype=torch.float64)
    shift = torch.zeros(5, dtype=torch.float64, requires_grad=True)

    def gradient(shape: Gaussian) -> Tensor:
        loss = consistency_loss(
            lambda x, t, c, end: shape.flow_map_network(x, t, c, end) + shift,
            x0,
            noise,
            t,
            None,
            end=share * t,
            teacher=gaussian.velocity,
            form=form,
            derivative=derivative,
        )
        return torch.autograd.grad(loss.value.sum(), shift)[0]

    accuracy = 1e-10 if derivative is exact_jvp else 1e-6
    assert gradient(gaussian).abs().max() < accuracy
    assert gradient(Gaussian(std=0.5)).abs().max() > 1e-2
    assert gradient(Gaussian(mean=0.8)).abs().max() > 1e-2


@DERIVATIVES
def test_the_derivative_is_an_option(case, derivative: Derivative) -> None:  # type: ignore[no-untyped-def]
    student, teacher, x, t = case
    v = teacher(x, t).detach()
    calls: list[Tensor] = []

    def recorded(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        value, d = derivative(*args, **options)
        calls.append(d)
        return value, d

    for end in (None, t / 3):
        exact = consistency_tangent(student, x, t, v, None, end=end)
        tangent = consistency_tangent(student, x, t, v, None, end=end, derivative=recorded)
        torch.testing.assert_close(tangent.g, exact.g, atol=1e-7, rtol=0)
        assert tangent.jvp is calls[-1]
        consistency_loss(student, x, v, t, None, end=end, derivative=recorded)
    assert len(calls) == 4


def test_exact_consistency_function_has_zero_tangent(gaussian: Gaussian) -> None:
    t = torch.linspace(0.05, 1.57, 6, dtype=torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64)
    tangent = consistency_tangent(gaussian.consistency, x, t, gaussian.velocity(x, t), None)
    torch.testing.assert_close(tangent.g, torch.zeros_like(x), atol=1e-12, rtol=0)


def test_warmup_scales_the_second_term_of_the_tangent(case) -> None:  # type: ignore[no-untyped-def]
    student, teacher, x, t = case
    v = teacher(x, t).detach()
    g = {r: consistency_tangent(student, x, t, v, None, warmup=r).g for r in (0.0, 0.3, 1.0)}
    cos = torch.cos(t)[:, None]
    torch.testing.assert_close(g[0.0], -(cos**2) * (student(x, t).detach() - v))
    torch.testing.assert_close(g[0.3], 0.7 * g[0.0] + 0.3 * g[1.0])


def test_forms_agree_after_warmup_and_rcm_does_not_scale_the_jvp(case) -> None:  # type: ignore[no-untyped-def]
    student, teacher, x, t = case
    v = teacher(x, t).detach()
    scm = consistency_tangent(student, x, t, v, None, form="scm")
    rcm = consistency_tangent(student, x, t, v, None, form="rcm")
    torch.testing.assert_close(scm.g, rcm.g)

    early = consistency_tangent(student, x, t, v, None, form="rcm", warmup=0.3)
    cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
    literal = -cos * torch.sqrt(1 - 0.09 * sin**2) * (early.f - v) - 0.3 * cos * sin * x - early.jvp
    torch.testing.assert_close(early.g, literal)


def test_training_from_data_has_the_tangent_of_the_exact_teacher_on_average(
    gaussian: Gaussian,
) -> None:
    """Two noises symmetric around E[z|x] give the same x; their tangents average to the ODE's."""
    student = SmoothNetwork(5).double()
    t = torch.linspace(0.05, 1.5, 6, dtype=torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64)
    v = gaussian.velocity(x, t)
    offset = torch.randn_like(x)
    pair = [consistency_tangent(student, x, t, v + s * offset, None).g for s in (1, -1)]
    exact = consistency_tangent(student, x, t, v, None).g
    torch.testing.assert_close((pair[0] + pair[1]) / 2, exact)


def test_without_a_teacher_the_ode_velocity_is_that_of_data_and_noise() -> None:
    student = SmoothNetwork(5).double()
    x0, noise = torch.randn(2, 6, 5, dtype=torch.float64)
    t = torch.linspace(0.05, 1.5, 6, dtype=torch.float64)
    x, v = interpolate(x0, noise, t), velocity(x0, noise, t)
    loss = consistency_loss(student, x0, noise, t, None)
    g = consistency_tangent(student, x, t, v, None).g
    torch.testing.assert_close(loss.diagnostics["tangent_norm"], sample_norm(g, "rms"))


@pytest.mark.parametrize(("norm", "elements"), [("rms", 5), ("l2", 1)])
def test_gradient_with_respect_to_f_is_minus_twice_the_normalised_tangent(
    norm: Norm, elements: int
) -> None:
    x0, noise = torch.randn(2, 6, 5, dtype=torch.float64)
    t = torch.linspace(0.05, 1.5, 6, dtype=torch.float64)
    f = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    loss = consistency_loss(lambda x, t, c: f + 0 * x, x0, noise, t, None, tangent_norm=norm)
    loss.value.sum().backward()
    x, v = interpolate(x0, noise, t), velocity(x0, noise, t)
    g = consistency_tangent(lambda x, t, c: f.detach() + 0 * x, x, t, v, None).g
    size = g.norm(dim=1, keepdim=True) / elements**0.5
    torch.testing.assert_close(f.grad, -2 * g / (size + 0.1) / elements)


def test_normalised_tangent_keeps_direction_and_bounds_the_norm() -> None:
    g = torch.randn(6, 3, 4) * torch.logspace(-3, 3, 6).view(-1, 1, 1)
    for norm in ("rms", "l2"):
        unit = normalize_tangent(g, norm=norm, eps=0.1)  # type: ignore[arg-type]
        size = sample_norm(g, norm)  # type: ignore[arg-type]
        torch.testing.assert_close(sample_norm(unit, norm), size / (size + 0.1))  # type: ignore[arg-type]
        cosine = torch.cosine_similarity(unit.flatten(1), g.flatten(1))
        torch.testing.assert_close(cosine, torch.ones(6))


def test_a_student_that_is_the_teacher_has_a_zero_gradient_at_the_start_of_warmup() -> None:
    student = SmoothNetwork(5)
    x0, noise, t = torch.randn(6, 5), torch.randn(6, 5), torch.linspace(0.1, 1.5, 6)
    consistency_loss(student, x0, noise, t, None, teacher=student, warmup=0).value.sum().backward()
    assert all((p.grad == 0).all() for p in student.parameters())


@DERIVATIVES
@pytest.mark.parametrize("has_end", [False, True])
def test_both_passes_see_the_same_dropout_masks_and_times(
    derivative: Derivative, has_end: bool
) -> None:
    net = SmoothNetwork(5, width=256, dropout=0.5)
    x0, noise, t = torch.randn(6, 5), torch.randn(6, 5), torch.linspace(0.1, 1.5, 6)
    outputs = []

    def student(x: Tensor, t: Tensor, condition: object, end: Tensor | None = None) -> Tensor:
        f = net(x, t, condition, end)
        if torch.is_grad_enabled():
            outputs.append(f.detach())
        return f

    def recorded(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        value, d = derivative(*args, **options)
        outputs.append(value)
        return value, d

    end = t / 3 if has_end else None
    consistency_loss(student, x0, noise, t, None, end=end, derivative=recorded)
    of_the_tangent, of_the_loss = outputs
    torch.testing.assert_close(of_the_tangent, of_the_loss)


def test_the_residual_is_the_normalised_tangent_whatever_the_passes_round() -> None:
    """float32 numbers near 100000 differ by 0.008, and the two passes round differently."""
    x0, noise, t = torch.randn(6, 5), torch.randn(6, 5), torch.linspace(0.1, 1.5, 6)

    def rounded(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        value, d = exact_jvp(*args, **options)
        return value + 0.1, d

    def student(x: Tensor, t: Tensor, condition: object) -> Tensor:
        return 1e5 + x

    loss = consistency_loss(student, x0, noise, t, None, derivative=rounded)
    g = loss.diagnostics["tangent_norm"]
    torch.testing.assert_close(loss.value, (g / (g + 0.1)) ** 2)


@DERIVATIVES
def test_loss_has_gradients_under_autocast(derivative: Derivative) -> None:
    """The tangent runs without gradients; autocast must not reuse its cached weights afterwards."""
    student = SmoothNetwork(5)
    x0, noise, t = torch.randn(6, 5), torch.randn(6, 5), torch.linspace(0.1, 1.5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = consistency_loss(student, x0, noise, t, None, derivative=derivative)
    loss.value.sum().backward()
    for parameter in student.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


@DERIVATIVES
@pytest.mark.parametrize("has_end", [False, True])
def test_a_sample_with_nan_is_masked_and_counted(derivative: Derivative, has_end: bool) -> None:
    student = SmoothNetwork(5)
    x0, noise, t = torch.randn(6, 5), torch.randn(6, 5), torch.linspace(0.1, 1.5, 6)

    def loss_of(samples: Tensor) -> Loss:
        end = t[samples] / 3 if has_end else None
        loss = consistency_loss(
            student, x0[samples], noise[samples], t[samples], None, end=end, derivative=derivative
        )
        student.zero_grad()
        loss.value.sum().backward()
        return loss

    loss_of(torch.tensor([0, 1, 3, 4, 5]))
    expected = [p.grad.clone() for p in student.parameters()]  # type: ignore[union-attr]
    x0[2, 3] = float("nan")
    loss = loss_of(torch.arange(6))
    assert loss.diagnostics["nonfinite"].tolist() == [0, 0, 1, 0, 0, 0]
    assert loss.value[2] == 0
    for parameter, gradient in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_learned_weight_settles_at_the_inverse_of_the_loss() -> None:
    """d/dw (e^w l - w) = 0 at w = -log(l)."""
    student = SmoothNetwork(5)
    x0, noise, t = torch.randn(6, 5), torch.randn(6, 5), torch.linspace(0.1, 1.5, 6)
    plain = consistency_loss(student, x0, noise, t, None).value.detach()
    w = (-plain.log()).requires_grad_()
    consistency_loss(student, x0, noise, t, None, log_weight=lambda t: w).value.sum().backward()
    torch.testing.assert_close(w.grad, torch.zeros(6), atol=1e-5, rtol=0)


def test_jvp_cosine_detects_a_network_that_rounds_its_time(case) -> None:  # type: ignore[no-untyped-def]
    student, teacher, x, t = case
    t = torch.linspace(0.1, 1.4, 6, dtype=torch.float64)
    v = teacher(x, t).detach()

    class Rounding(torch.autograd.Function):
        """A cast that the JVP ignores."""

        @staticmethod
        def forward(t):  # type: ignore[no-untyped-def]
            return (1000 * t).bfloat16().double() / 1000

        @staticmethod
        def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
            pass

        @staticmethod
        def jvp(ctx, tangent):  # type: ignore[no-untyped-def]
            return tangent

    def rounding(x: Tensor, t: Tensor, condition: object) -> Tensor:
        return student(0.01 * x, 10 * Rounding.apply(t))  # type: ignore[no-untyped-call]

    for end in (None, t / 3, t):
        cosine = jvp_cosine(student, x, t, v, None, end=end)
        torch.testing.assert_close(cosine, torch.ones(6).double(), atol=1e-5, rtol=0)
    assert jvp_cosine(rounding, x, t, v, None).min() < 0.5


def test_distilling_a_gaussian_teacher_gives_the_closed_form(
    gaussian: Gaussian, generator: torch.Generator
) -> None:
    student = SmoothNetwork(1, width=64)
    steps, draw = 1500, LogNormal(mean=0.0, std=1.6)

    def loss(step: int) -> Loss:
        z, noise = torch.randn(2, 128, 1, generator=generator)
        return consistency_loss(
            student,
            gaussian.mean + gaussian.std * z,
            noise,
            draw(128, generator),
            None,
            teacher=gaussian.velocity,
            warmup=min(1.0, step / 300),
        )

    train(student, steps, loss)
    noise = torch.randn(2000, 1, generator=generator)
    t = torch.full((2000,), torch.pi / 2)
    with torch.no_grad():
        error = denoise(student, noise, t, None) - gaussian.ode_end(noise, t)
        teacher_error = denoise(gaussian.velocity, noise, t, None) - gaussian.ode_end(noise, t)
    assert teacher_error.square().mean().sqrt() > 0.35  # the mean of the data, whatever the noise
    assert error.square().mean().sqrt() < 0.07


@pytest.mark.parametrize(
    "derivative", [exact_jvp, central_difference(1e-3)], ids=["exact", "difference"]
)
def test_distilling_a_flow_map_gives_the_closed_form_in_any_number_of_steps(
    gaussian: Gaussian, generator: torch.Generator, derivative: Derivative
) -> None:
    student = SmoothNetwork(1, width=64)
    draw = LogNormal(mean=0.0, std=1.6)

    def loss(step: int) -> Loss:
        z, noise = torch.randn(2, 128, 1, generator=generator)
        t = draw(128, generator)
        return consistency_loss(
            student,
            gaussian.mean + gaussian.std * z,
            noise,
            t,
            None,
            end=t * torch.clamp(1.5 * torch.rand(128, generator=generator) - 0.25, 0, 1),
            teacher=gaussian.velocity,
            warmup=min(1.0, step / 100),
            derivative=derivative,
        )

    train(student, 500, loss)
    errors = flow_map_errors(student, gaussian, generator)
    for steps, bound in ((1, 0.12), (2, 0.06), (4, 0.06)):
        assert errors[steps] < bound


def test_invalid_arguments_raise() -> None:
    net, x, t = SmoothNetwork(5), torch.randn(6, 5), torch.linspace(0.1, 1.5, 6)
    with pytest.raises(ValueError, match="noise has shape"):
        consistency_loss(net, x, x[:, :4], t, None)
    with pytest.raises(ValueError, match="one time per sample"):
        consistency_loss(net, x, x, t[:3], None)
    with pytest.raises(ValueError, match="t lies in"):
        consistency_loss(net, x, x, t + 1, None)
    with pytest.raises(ValueError, match=r"end has shape \(3,\), but t has \(6,\)"):
        consistency_loss(net, x, x, t, None, end=t[:3])
    with pytest.raises(ValueError, match=r"max\(end - t\) is 0.05; the end of a flow map lies in"):
        consistency_loss(net, x, x, t, None, end=t + 0.05)
    with pytest.raises(ValueError, match="'max' is unknown; allowed are 'rms' and 'l2'"):
        consistency_loss(net, x, x, t, None, tangent_norm="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'mean' is unknown; allowed are 'scm' and 'rcm'"):
        consistency_loss(net, x, x, t, None, form="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tangent_norm_eps is 0"):
        consistency_loss(net, x, x, t, None, tangent_norm_eps=0)
    with pytest.raises(ValueError, match=r"warmup is 1.5; it must lie in \[0, 1\]"):
        consistency_loss(net, x, x, t, None, warmup=1.5)
    with pytest.raises(ValueError, match="float16"):
        consistency_loss(net, x, x, t.half(), None)
