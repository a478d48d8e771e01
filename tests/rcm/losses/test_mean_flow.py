"""MeanFlow regresses the mean velocity U to v - (u - r) dU/du; iMF uses its own velocity in dU/du.

Residuals U + (u - r) dU/du - v are compared with rectified flow, in which the papers are written.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rcm.derivatives import central_difference, exact_jvp, one_pass_jvp
from rcm.guidance import GuidedCondition
from rcm.losses.flow_matching import flow_matching_loss
from rcm.losses.loss import Loss
from rcm.losses.mean_flow import mean_flow_loss, mean_velocity
from rcm.network_conversions import to_rectified_flow
from rcm.time_conversions import u_from_t
from rcm.time_pairs import UniformEnd
from rcm.time_sampling import LogNormal
from rcm.trigflow import Network, interpolate, velocity
from tests.rcm.analytic_networks import Gaussian, SmoothNetwork, flow_map_errors, train
from tests.rcm.losses.guided_gaussian import GuidedGaussian

T = torch.tensor([0.1, 0.4, 0.7, 1.0, 1.3, torch.pi / 2, torch.pi / 2], dtype=torch.float64)
END = T * torch.tensor([0.0, 0.3, 0.5, 0.0, 1.0, 0.9, 0.0], dtype=torch.float64)
INSIDE = T.lt(torch.pi / 2)  # where a central difference has room
Z = (torch.cos(T) + torch.sin(T))[:, None]


class WithHead:
    """A flow map with an auxiliary velocity head."""

    def __init__(self, net: Network, velocity: Network) -> None:
        self.net, self.velocity = net, velocity

    def __call__(self, x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        return self.net(x, t, condition, end=end)

    def heads(self, x: Tensor, t: Tensor, condition: Any, end: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x, t, condition, end=end), self.velocity(x, t, condition)


class Guidable(SmoothNetwork):
    """A network of x, two times, a condition (batch,) and its guidance."""

    def forward(
        self, x: Tensor, t: Tensor, condition: GuidedCondition, end: Tensor | None = None
    ) -> Tensor:
        label, scale, low, high = (value[:, None] for value in condition)
        return super().forward(x * label + scale, t, None, end) + low * x - high


def perturbed(net: Network, offset: Tensor) -> Network:
    """net + offset, (batch, ...); an auxiliary head stays as it is."""

    def moved(x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        return net(x, t, condition, end=end) + offset

    return WithHead(moved, net.velocity) if isinstance(net, WithHead) else moved


def residual(student: Network, x0: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """U - U_target, from the gradient with respect to an offset of F: dU/dF = Z."""
    offset = torch.zeros_like(x0, requires_grad=True)
    loss = mean_flow_loss(perturbed(student, offset), x0, *arguments, power=0, **options)
    (gradient,) = torch.autograd.grad(loss.value.sum(), offset)
    return gradient / (2 * Z)


def rectified_residual(
    student: Network, x: Tensor, condition: Any, v: Tensor, direction: Tensor
) -> Tensor:
    """The same as the papers write it: everything in rectified flow, by torch.func.jvp."""
    u, r, net = u_from_t(T), u_from_t(END), to_rectified_flow(student)
    mean, derivative = torch.func.jvp(
        lambda x, u: net(x, u, condition, end=r), (x / Z, u), (direction, torch.ones_like(u))
    )
    return (mean + (u - r)[:, None] * derivative - v).detach()


def posterior_means(data: Gaussian, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """E[x0|x] and E[z|x]: a pair on the path at x whose velocity is that of the ODE."""
    f = data.velocity(x, t)
    cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
    return cos * x - sin * f, sin * x + cos * f


@pytest.fixture
def case() -> tuple[SmoothNetwork, SmoothNetwork, Tensor, Tensor]:
    """student, teacher, x0, noise (7, 5) in float64."""
    networks = SmoothNetwork(5).double(), SmoothNetwork(5).double()
    return *networks, *torch.randn(2, 7, 5, dtype=torch.float64)


# ---- the mean velocity -------------------------------------------------------------------------


def test_mean_velocity_is_that_of_rectified_flow(case) -> None:  # type: ignore[no-untyped-def]
    student, _, x, _ = case
    expected = to_rectified_flow(student)(x / Z, u_from_t(T), None, end=u_from_t(END))
    torch.testing.assert_close(mean_velocity(student(x, T, None, END), x, T), expected)


def test_mean_velocity_of_the_data_velocity_is_noise_minus_data() -> None:
    x0, noise = torch.randn(2, 7, 5, dtype=torch.float64)
    v = mean_velocity(velocity(x0, noise, T), interpolate(x0, noise, T), T)
    torch.testing.assert_close(v, noise - x0)


# ---- the target --------------------------------------------------------------------------------


@pytest.mark.parametrize("improved", [False, True])
@pytest.mark.parametrize("distilled", [False, True])
def test_residual_is_that_of_rectified_flow(case, distilled: bool, improved: bool) -> None:  # type: ignore[no-untyped-def]
    student, teacher, x0, noise = case
    x = interpolate(x0, noise, T)
    v = mean_velocity(teacher(x, T), x, T) if distilled else noise - x0
    own = mean_velocity(student(x, T, None, T), x, T)
    actual = residual(
        student,
        *(x0, noise, T, END, None),
        teacher=teacher if distilled else None,
        improved=improved,
    )
    expected = rectified_residual(student, x, None, v, own if improved else v)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


def test_derivative_is_the_difference_quotient_along_the_ode(case) -> None:  # type: ignore[no-untyped-def]
    """U(x_u, u, r) at two close points of a line of direction v."""
    student, _, x0, noise = case
    u, r, h = u_from_t(T), u_from_t(END), 1e-4
    x_u, v = (1 - u)[:, None] * x0 + u[:, None] * noise, noise - x0
    net = to_rectified_flow(student)
    ahead, behind = (net(x_u + s * v, u + s, None, end=r).detach() for s in (h, -h))
    mean = net(x_u, u, None, end=r).detach()
    quotient = mean - v + (u - r)[:, None] * (ahead - behind) / (2 * h)
    actual = residual(student, x0, noise, T, END, None)
    torch.testing.assert_close(actual, quotient, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("improved", [False, True])
def test_at_end_equal_to_t_the_loss_is_flow_matching(case, improved: bool) -> None:  # type: ignore[no-untyped-def]
    """Of rectified flow: the error of v is Z times that of F."""
    student, _, x0, noise = case
    velocity_network = lambda x, t, condition: student(x, t, condition, t)  # noqa: E731
    loss = mean_flow_loss(student, x0, noise, T, T, None, improved=improved, norm="rms", power=0)
    expected = flow_matching_loss(velocity_network, x0, noise, T, None)
    torch.testing.assert_close(loss.value, Z[:, 0] ** 2 * expected.value)
    assert not loss.diagnostics["jvp_norm"].any()


def test_warmup_scales_the_derivative(case) -> None:  # type: ignore[no-untyped-def]
    student, teacher, x0, noise = case
    r = {
        warmup: residual(student, x0, noise, T, END, None, teacher=teacher, warmup=warmup)
        for warmup in (0.0, 0.3, 1.0)
    }
    x = interpolate(x0, noise, T)
    plain = mean_velocity((student(x, T, None, END) - teacher(x, T)).detach(), 0 * x, T)
    torch.testing.assert_close(r[0.0], plain)
    torch.testing.assert_close(r[0.3], 0.7 * r[0.0] + 0.3 * r[1.0])


@pytest.mark.parametrize("improved", [False, True])
def test_central_difference_agrees_with_the_exact_derivative(case, improved: bool) -> None:  # type: ignore[no-untyped-def]
    """The error is O(h²)."""
    student, _, x0, noise = case
    exact, close, far = (
        residual(student, x0, noise, T, END, None, improved=improved, derivative=derivative)
        for derivative in (exact_jvp, central_difference(1e-4), central_difference(1e-2))
    )
    error, far_error = ((r - exact)[INSIDE].abs().max() for r in (close, far))
    assert error < 1e-6
    assert 3e3 < far_error / error < 3e4


# ---- fixed points ------------------------------------------------------------------------------


@pytest.mark.parametrize("improved", [False, True])
@pytest.mark.parametrize("derivative", [exact_jvp, central_difference(1e-4)], ids=["exact", "fd"])
def test_exact_flow_map_is_a_fixed_point_and_others_are_not(
    gaussian: Gaussian, improved: bool, derivative: Any
) -> None:
    x0, noise = torch.randn(2, 7, 5, dtype=torch.float64)

    def gradient(student: Network) -> Tensor:
        return residual(
            student,
            *(x0, noise, T, END, None),
            teacher=gaussian.velocity,
            improved=improved,
            derivative=derivative,
        )

    tolerance = 1e-10 if derivative is exact_jvp else 1e-6
    assert gradient(gaussian.flow_map_network)[INSIDE].abs().max() < tolerance
    wrong_data = Gaussian(gaussian.mean, 2 * gaussian.std).flow_map_network
    for wrong in (gaussian.velocity, gaussian.consistency, wrong_data):
        assert gradient(wrong).abs().amax(1).max() > 0.05


def test_exact_flow_map_is_a_fixed_point_of_the_normalised_loss(gaussian: Gaussian) -> None:
    """With respect to a parameter of a perturbation that depends on x and both times."""
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    direction = SmoothNetwork(5).double()

    def student(x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        return gaussian.flow_map_network(x, t, None, end) + theta * direction(x, t, None, end)

    x = torch.randn(7, 5, dtype=torch.float64)
    x0, noise = posterior_means(gaussian, x, T)
    for improved in (False, True):
        loss = mean_flow_loss(student, x0, noise, T, END, None, improved=improved)
        (gradient,) = torch.autograd.grad(loss.value.sum(), theta)
        assert abs(gradient) < 1e-10
    loss = mean_flow_loss(perturbed(student, torch.ones(())), x0, noise, T, END, None)
    (gradient,) = torch.autograd.grad(loss.value.sum(), theta)
    assert abs(gradient) > 1e-2


def test_targets_of_both_methods_average_to_that_of_the_ode(gaussian: Gaussian) -> None:
    """Two data velocities symmetric around E[v|x]. Only MeanFlow differentiates along them."""
    net = SmoothNetwork(5).double()
    x0, noise, offset = torch.randn(3, 7, 5, dtype=torch.float64)

    def noisy(sign: int) -> Network:
        return lambda x, t, condition, end=None: gaussian.velocity(x, t) + sign * offset

    def pair(student: Network, improved: bool) -> list[Tensor]:
        return [
            residual(student, x0, noise, T, END, None, teacher=noisy(s), improved=improved)
            for s in (1, -1)
        ]

    exact = residual(net, x0, noise, T, END, None, teacher=gaussian.velocity)
    mean_flow = pair(net, improved=False)
    torch.testing.assert_close((mean_flow[0] + mean_flow[1]) / 2, exact)

    student = WithHead(net, gaussian.velocity)  # its own velocity is E[v|x]
    improved = pair(student, improved=True)
    torch.testing.assert_close((improved[0] + improved[1]) / 2, exact)
    torch.testing.assert_close(improved[1] - improved[0], 2 * Z * offset)
    assert ((mean_flow[1] - mean_flow[0]) - 2 * Z * offset)[0].abs().max() > 1e-3


# ---- the auxiliary head and guidance -----------------------------------------------------------


def test_auxiliary_head_gives_the_direction_and_is_trained_on_the_velocity(case) -> None:  # type: ignore[no-untyped-def]
    net, head, x0, noise = case
    student = WithHead(net, head)
    x = interpolate(x0, noise, T)
    own = mean_velocity(head(x, T), x, T)
    actual = residual(student, x0, noise, T, END, None, improved=True)
    expected = rectified_residual(net, x, None, noise - x0, own)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)

    loss = mean_flow_loss(student, x0, noise, T, END, None, improved=True, eps=0.01)
    error, head_error = (own_error.square().sum(1) for own_error in (expected, own - noise + x0))
    torch.testing.assert_close(loss.diagnostics["mean_flow"], error)
    torch.testing.assert_close(loss.diagnostics["auxiliary"], head_error.detach())
    terms = error / (error + 0.01) + head_error / (head_error.detach() + 0.01)
    torch.testing.assert_close(loss.value, terms)
    actual = torch.autograd.grad(loss.value.sum(), head.parameters())
    torch.testing.assert_close(actual, torch.autograd.grad(terms.sum(), head.parameters()))


def test_without_improved_the_auxiliary_head_is_not_used(case) -> None:  # type: ignore[no-untyped-def]
    net, head, x0, noise = case
    plain = mean_flow_loss(net, x0, noise, T, END, None)
    torch.testing.assert_close(
        mean_flow_loss(WithHead(net, head), x0, noise, T, END, None).value, plain.value
    )


def guidance_of(scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.full_like(T, scale), torch.zeros_like(T), torch.full_like(T, torch.pi / 2)


@pytest.mark.parametrize("scale", [1.0, 2.5, 7.0])
def test_guided_flow_map_is_a_fixed_point(scale: float) -> None:
    data = GuidedGaussian()
    x0, noise = torch.randn(2, 7, 5, dtype=torch.float64)
    means = torch.linspace(-1, 1, 7, dtype=torch.float64)

    def gradient(student: Network, scale: float) -> Tensor:
        return residual(
            student,
            *(x0, noise, T, END, means),
            teacher=data.velocity,
            improved=True,
            guidance=guidance_of(scale),
            null_condition=data.null_condition,
        )

    assert gradient(data.flow_map_network, scale).abs().max() < 1e-10

    def of_scale_two(x: Tensor, t: Tensor, condition: GuidedCondition, end: Tensor) -> Tensor:
        weaker = condition._replace(scale=1 + (condition.scale - 1) / 2)
        return data.flow_map_network(x, t, weaker, end)

    if scale > 1:
        assert gradient(of_scale_two, scale).abs().max() > 0.05


def test_guidance_follows_the_formula_inside_the_interval_only() -> None:
    """v_g = v + (1 - 1/w) (v_c - v_u), w = 1 outside; the derivative is along v_c."""
    student = Guidable(5).double()
    x0, noise = torch.randn(2, 7, 5, dtype=torch.float64)
    x, label = interpolate(x0, noise, T), torch.randn(7, dtype=torch.float64)
    scale = torch.linspace(1, 8, 7, dtype=torch.float64)
    low, high = torch.full_like(T, 0.4), torch.full_like(T, 1.3)
    zero, half_pi = torch.zeros_like(T), torch.full_like(T, torch.pi / 2)
    w = torch.tensor([1, *scale[1:5], 1, 1], dtype=torch.float64)

    def own(label: Tensor, w: Tensor) -> Tensor:
        f = student(x, T, GuidedCondition(label, w, zero, half_pi), T)
        return mean_velocity(f, x, T).detach()

    v_c, v_u = own(label, w), own(label + 1, torch.ones_like(T))
    v = noise - x0 + (1 - 1 / w)[:, None] * (v_c - v_u)
    condition = GuidedCondition(label, scale, low, high)
    actual = residual(
        student,
        *(x0, noise, T, END, label),
        improved=True,
        guidance=(scale, low, high),
        null_condition=lambda label: label + 1,
    )
    expected = rectified_residual(student, x, condition, v, v_c)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


# ---- value, masks, arguments -------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "elements"), [("l2", 1), ("rms", 5)])
@pytest.mark.parametrize(("power", "eps"), [(1.0, 1e-3), (0.5, 0.01), (0.0, 1.0)])
def test_value_is_the_error_over_its_stopped_power(
    case, norm: Any, elements: int, power: float, eps: float
) -> None:  # type: ignore[no-untyped-def]
    student, _, x0, noise = case
    error = residual(student, x0, noise, T, END, None)
    offset = torch.zeros_like(x0, requires_grad=True)
    loss = mean_flow_loss(
        perturbed(student, offset),
        *(x0, noise, T, END, None),
        norm=norm,
        power=power,
        eps=eps,
    )
    squared = error.square().sum(1) / elements
    torch.testing.assert_close(loss.diagnostics["mean_flow"], squared)
    torch.testing.assert_close(loss.value.detach(), squared / (squared + eps) ** power)
    (gradient,) = torch.autograd.grad(loss.value.sum(), offset)
    weight = (1 / (squared + eps) ** power)[:, None]
    torch.testing.assert_close(gradient, 2 * Z * error * weight / elements)


def finite_gradients(student: nn.Module, loss: Loss) -> list[Tensor]:
    student.zero_grad()
    loss.value.sum().backward()
    return [p.grad.clone() for p in student.parameters()]  # type: ignore[union-attr]


@pytest.mark.parametrize("improved", [False, True])
def test_a_sample_with_nan_is_masked_and_counted(case, improved: bool) -> None:  # type: ignore[no-untyped-def]
    student, _, x0, noise = case
    good = torch.tensor([0, 1, 3, 4, 5, 6])
    clean = mean_flow_loss(
        student, x0[good], noise[good], T[good], END[good], None, improved=improved
    )
    expected = finite_gradients(student, clean)
    x0[2, 3] = float("nan")
    loss = mean_flow_loss(student, x0, noise, T, END, None, improved=improved)
    assert loss.diagnostics["nonfinite"].tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert all(value[2] == 0 for name, value in loss.diagnostics.items() if name != "nonfinite")
    torch.testing.assert_close(loss.value[good], clean.value)
    assert loss.value[2] == 0
    torch.testing.assert_close(finite_gradients(student, loss), expected)


def test_a_nonfinite_teacher_is_masked_and_counted(case) -> None:  # type: ignore[no-untyped-def]
    student, _, x0, noise = case

    def broken(x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        return torch.where(t[:, None] > 1.5, float("inf"), x)

    loss = mean_flow_loss(student, x0, noise, T, END, None, teacher=broken)
    assert loss.diagnostics["nonfinite"].tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert all(gradient.isfinite().all() for gradient in finite_gradients(student, loss))


@pytest.mark.parametrize("derivative", [exact_jvp, one_pass_jvp])
def test_an_auxiliary_head_that_overflows_is_masked_and_counted(case, derivative: Any) -> None:  # type: ignore[no-untyped-def]
    """It overflows where end < t, so that the direction of the derivative is finite."""
    net, head, x0, noise = case

    class Overflowing(WithHead):
        def heads(self, x: Tensor, t: Tensor, condition: Any, end: Tensor) -> tuple[Tensor, Tensor]:
            f, velocity = super().heads(x, t, condition, end)
            sample = (torch.arange(len(x)) == 2) & (end < t)
            return f, torch.where(sample[:, None], float("inf"), velocity)

    def loss_of(student: WithHead, samples: Tensor) -> tuple[Loss, list[Tensor]]:
        loss = mean_flow_loss(
            student,
            *(x0[samples], noise[samples], T[samples], END[samples], None),
            improved=True,
            derivative=derivative,
        )
        return loss, finite_gradients(nn.ModuleList([net, head]), loss)

    good = torch.tensor([0, 1, 3, 4, 5, 6])
    clean, expected = loss_of(WithHead(net, head), good)
    loss, found = loss_of(Overflowing(net, head), torch.arange(7))
    assert loss.diagnostics["nonfinite"].tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert all(value[2] == 0 for name, value in loss.diagnostics.items() if name != "nonfinite")
    torch.testing.assert_close(loss.value[good], clean.value)
    assert loss.value[2] == 0
    torch.testing.assert_close(found, expected)


def test_both_passes_see_the_same_dropout_masks(case) -> None:  # type: ignore[no-untyped-def]
    """At end = t the error is that of one pass, whose derivative term is zero."""
    student = SmoothNetwork(5, width=256, dropout=0.5).double()
    _, _, x0, noise = case
    loss = mean_flow_loss(student, x0, noise, T, T, None, power=0)
    torch.testing.assert_close(loss.value.detach(), loss.diagnostics["velocity_error"] ** 2)


@pytest.mark.parametrize("improved", [False, True])
def test_loss_has_gradients_under_autocast(improved: bool) -> None:
    """Passes without gradients come first; autocast must not reuse their cached weights."""
    student = SmoothNetwork(5)
    x0, noise, t = torch.randn(6, 5), torch.randn(6, 5), torch.linspace(0.1, 1.5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mean_flow_loss(student, x0, noise, t, 0.5 * t, None, improved=improved)
    assert all(gradient.abs().sum() > 0 for gradient in finite_gradients(student, loss))


def test_training_from_data_gives_the_closed_form(
    gaussian: Gaussian, generator: torch.Generator
) -> None:
    student = SmoothNetwork(1, width=64)
    pairs = UniformEnd(times=LogNormal(mean=0.0, std=1.6))

    def loss(step: int) -> Loss:
        z, noise = torch.randn(2, 128, 1, generator=generator)
        return mean_flow_loss(
            student,
            gaussian.mean + gaussian.std * z,
            noise,
            *pairs(128, generator),
            None,
            improved=True,
            warmup=min(1.0, step / 100),
            norm="rms",
            power=0.5,
            eps=0.01,
        )

    train(student, 500, loss)
    assert max(flow_map_errors(student, gaussian, generator).values()) < 0.18


def test_invalid_arguments_raise() -> None:
    net, x, t = SmoothNetwork(5), torch.randn(6, 5), torch.linspace(0.1, 1.5, 6)

    def loss(noise: Tensor = x, t: Tensor = t, end: Tensor = t / 2, **options: Any) -> Loss:
        return mean_flow_loss(net, x, noise, t, end, None, **options)

    with pytest.raises(ValueError, match="noise has shape"):
        loss(noise=x[:, :4])
    with pytest.raises(ValueError, match="one time per sample"):
        loss(t=t[:3])
    with pytest.raises(ValueError, match="the end of a flow map lies in"):
        loss(end=t + 0.01)
    with pytest.raises(ValueError, match=r"warmup is 1\.5; it must be a number in \[0, 1\]"):
        loss(warmup=1.5)
    with pytest.raises(ValueError, match="'max' is unknown; allowed are 'rms' and 'l2'"):
        loss(norm="max")
    with pytest.raises(ValueError, match="eps is 0"):
        loss(eps=0)
    with pytest.raises(ValueError, match="power is -1"):
        loss(power=-1)
    guidance = torch.ones(6), torch.zeros(6), torch.ones(6)
    with pytest.raises(ValueError, match="guidance needs improved=True and a null_condition"):
        loss(guidance=guidance, null_condition=lambda c: c)
    with pytest.raises(ValueError, match="guidance needs improved=True and a null_condition"):
        loss(guidance=guidance, improved=True)
    options = {"improved": True, "null_condition": lambda c: c}
    with pytest.raises(ValueError, match="scale of guidance has shape"):
        loss(guidance=(torch.ones(1), *guidance[1:]), **options)
    with pytest.raises(ValueError, match="scale of guidance is as low as 0; it must be positive"):
        loss(guidance=(torch.zeros(6), *guidance[1:]), **options)
