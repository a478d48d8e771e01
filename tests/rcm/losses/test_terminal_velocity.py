"""TVM: the end of a flow map moves with the velocity that the flow map itself has there."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rcm.derivatives import Derivative, central_difference, exact_jvp
from rcm.guidance import GuidedCondition
from rcm.losses.loss import Loss
from rcm.losses.mean_flow import mean_velocity
from rcm.losses.terminal_velocity import scaled_by_guidance, terminal_velocity_loss
from rcm.models.dit import DiT
from rcm.network_conversions import to_rectified_flow
from rcm.time_conversions import u_from_t
from rcm.time_pairs import TruncatedEnd
from rcm.time_sampling import LogNormal
from rcm.trigflow import Network, cos_sin, interpolate
from tests.rcm.analytic_networks import Gaussian, SmoothNetwork, flow_map_errors, train
from tests.rcm.losses.guided_gaussian import GuidedGaussian

T = torch.tensor([0.1, 0.4, 0.7, 1.0, 1.3, torch.pi / 2, torch.pi / 2], dtype=torch.float64)
END = T * torch.tensor([0.2, 0.3, 0.5, 0.0, 1.0, 0.9, 0.7], dtype=torch.float64)
DERIVATIVES = pytest.mark.parametrize(
    "derivative", [exact_jvp, central_difference(1e-4)], ids=["exact", "difference"]
)
Case = tuple[SmoothNetwork, SmoothNetwork, Tensor, Tensor]


@pytest.fixture
def case() -> Case:
    """student, target, x0 and noise (7, 5), in float64."""
    networks = SmoothNetwork(5).double(), SmoothNetwork(5).double()
    return *networks, *torch.randn(2, 7, 5, dtype=torch.float64)


def loss_of(case: Case, condition: Any = None, **options: Any) -> Loss:
    student, target, x0, noise = case
    return terminal_velocity_loss(
        student, x0, noise, T, END, condition, **{"target": target, **options}
    )


def posterior_means(data: Gaussian, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """E[x0|x] and E[z|x]: a pair on the path at x whose velocity is that of the ODE."""
    f = data.velocity(x, t)
    cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
    return cos * x - sin * f, sin * x + cos * f


def f_of_velocity(u: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """TrigFlow's F = ((C - S) x + U)/Z of rectified flow's U."""
    cos, sin = cos_sin(t, x)
    return ((cos - sin) * x + u) / (cos + sin)


# ---- the two terms -----------------------------------------------------------------------------


def test_terms_are_those_of_rectified_flow(case: Case) -> None:
    """As the paper writes them, by torch.func.jvp of f = x_u + (r - u) U(x_u, u, r)."""
    student, target, x0, noise = case
    u, r = u_from_t(T), u_from_t(END)
    x_u, x_r = (interpolate(x0, noise, t) / (t.cos() + t.sin())[:, None] for t in (T, END))
    net, goal = to_rectified_flow(student), to_rectified_flow(target)

    def flow_map(r: Tensor) -> Tensor:
        return x_u + (r - u)[:, None] * net(x_u, u, None, end=r)

    point, derivative = torch.func.jvp(flow_map, (r,), (torch.ones_like(r),))
    terminal = (derivative - goal(point, r, None, end=r)).square().mean(1)
    flow_matching = (net(x_r, r, None, end=r) - (noise - x0)).square().mean(1)
    terminal = torch.where(END == T, 0.0, terminal)

    loss = loss_of(case)
    torch.testing.assert_close(loss.diagnostics["terminal"], terminal.detach())
    torch.testing.assert_close(loss.diagnostics["flow_matching"], flow_matching.detach())
    weighted = loss_of(case, terminal_weight=2.0, flow_matching_weight=0.3).value
    torch.testing.assert_close(weighted, 2 * terminal + 0.3 * flow_matching)


def test_terminal_derivative_is_the_difference_quotient_in_the_end(case: Case) -> None:
    """df/dr of the points f, of a student at rest: the target is 0 there."""
    student, _, x0, noise = case
    u, r, h = u_from_t(T), u_from_t(END), 1e-4
    x_u = interpolate(x0, noise, T) / (T.cos() + T.sin())[:, None]
    net = to_rectified_flow(student)
    later, earlier = (x_u + (r + s - u)[:, None] * net(x_u, u, None, end=r + s) for s in (h, -h))

    def at_rest(x: Tensor, t: Tensor, condition: Any, end: Tensor) -> Tensor:
        return f_of_velocity(torch.zeros_like(x), x, t)

    expected = ((later - earlier) / (2 * h)).square().mean(1)
    value = loss_of(case, target=at_rest).diagnostics["terminal"]
    inside = (END < T) & (END > 0)
    torch.testing.assert_close(value[inside], expected.detach()[inside], atol=1e-6, rtol=1e-6)


def test_terminal_term_is_zero_at_end_equal_to_t(case: Case) -> None:
    loss = loss_of(case)
    assert (loss.diagnostics["terminal"] == 0).tolist() == (END == T).tolist()
    assert (loss.diagnostics["flow_matching"] > 0).all()


def test_flow_matching_has_times_of_its_own_on_request(case: Case) -> None:
    student, _, x0, noise = case
    s = torch.linspace(0, torch.pi / 2, 7, dtype=torch.float64)
    x = interpolate(x0, noise, s)
    error = mean_velocity(student(x, s, None, s), x, s) - (noise - x0)
    loss = loss_of(case, flow_matching_times=s)
    torch.testing.assert_close(loss.diagnostics["flow_matching"], error.square().mean(1).detach())
    torch.testing.assert_close(loss.diagnostics["terminal"], loss_of(case).diagnostics["terminal"])


def test_the_default_target_is_the_student(case: Case) -> None:
    torch.testing.assert_close(
        loss_of(case, target=None).value, loss_of(case, target=copy.deepcopy(case[0])).value
    )


# ---- fixed points ------------------------------------------------------------------------------


@DERIVATIVES
@pytest.mark.parametrize("own_target", [False, True])
def test_exact_flow_map_is_a_fixed_point_and_others_are_not(
    gaussian: Gaussian, derivative: Derivative, own_target: bool
) -> None:
    """With respect to a parameter of a perturbation that depends on x and both times."""
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    direction = SmoothNetwork(5).double()
    x0, noise = posterior_means(gaussian, torch.randn(7, 5, dtype=torch.float64), END)

    def gradients(net: Network) -> tuple[float, float]:
        def student(x: Tensor, t: Tensor, condition: Any, end: Tensor) -> Tensor:
            return net(x, t, condition, end=end) + theta * direction(x, t, None, end)

        target = None if own_target else gaussian.velocity
        values = []
        for weights in ((1, 0), (0, 1)):
            loss = terminal_velocity_loss(
                student,
                *(x0, noise, T, END, None),
                target=target,
                terminal_weight=weights[0],
                flow_matching_weight=weights[1],
                derivative=derivative,
            )
            values.append(torch.autograd.grad(loss.value.sum(), theta)[0].item())
        return values[0], values[1]

    # At end = 0 the difference is one-sided, and of first order.
    tolerance = 1e-10 if derivative is exact_jvp else 1e-3
    terminal, flow_matching = gradients(gaussian.flow_map_network)
    assert abs(terminal) < tolerance
    assert abs(flow_matching) < 1e-10
    # The velocity of the data for every end has the right velocities, but is no flow map.
    terminal, flow_matching = gradients(gaussian.velocity)
    assert abs(terminal) > 1e-2
    assert abs(flow_matching) < 1e-10
    terminal, flow_matching = gradients(Gaussian(gaussian.mean, 2 * gaussian.std).flow_map_network)
    assert abs(flow_matching) > 1e-2


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.5, 7.0])
def test_guided_flow_map_is_a_fixed_point(scale: float, scaled: bool) -> None:
    data = GuidedGaussian()
    means = torch.linspace(-1, 1, 7, dtype=torch.float64)
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    direction = SmoothNetwork(5).double()

    def unscaled(x: Tensor, t: Tensor, condition: GuidedCondition, end: Tensor) -> Tensor:
        f = data.flow_map_network(x, t, condition, end)
        return f + theta * direction(x, t, None, end)

    def scaled_down(x: Tensor, t: Tensor, condition: GuidedCondition, end: Tensor) -> Tensor:
        """The network whose mean velocity is that of `unscaled` divided by w."""
        inverse = condition._replace(scale=1 / condition.scale)
        return scaled_by_guidance(lambda x, t, c, end: unscaled(x, t, condition, end))(
            x, t, inverse, end
        )

    student = scaled_by_guidance(scaled_down) if scaled else unscaled
    x = torch.randn(7, 5, dtype=torch.float64)
    x0, noise = posterior_means(Gaussian(means[:, None], data.std), x, END)  # type: ignore[arg-type]

    def gradient(scale: float) -> float:
        loss = terminal_velocity_loss(
            student,
            *(x0, noise, T, END, means),
            guidance_scale=torch.full_like(T, scale),
            null_condition=data.null_condition,
        )
        assert (loss.diagnostics["flow_matching"] < 1e-20).all()
        assert (loss.diagnostics["terminal"] < 1e-20).all()
        return torch.autograd.grad(loss.value.sum(), theta)[0].item()

    assert abs(gradient(scale)) < 1e-10


def test_guided_terms_are_those_of_the_paper() -> None:
    """f = x + (r - u) w U; targets w U' and w v + (1 - w) U'(null); weight β² = 1/w²."""
    base, base_target = SmoothNetwork(5).double(), SmoothNetwork(5).double()
    x0, noise = torch.randn(2, 7, 5, dtype=torch.float64)
    label = torch.randn(7, dtype=torch.float64)
    w = torch.linspace(1, 7, 7, dtype=torch.float64)
    u, r = u_from_t(T), u_from_t(END)
    x_u, x_r = (interpolate(x0, noise, t) / (t.cos() + t.sin())[:, None] for t in (T, END))

    def guidable(net: SmoothNetwork) -> Network:
        def wrapped(x: Tensor, t: Tensor, c: GuidedCondition, end: Tensor | None = None) -> Tensor:
            assert (c.low == 0).all() and (c.high == torch.pi / 2).all()
            return net(x * c.condition[:, None] + c.scale[:, None], t, None, end)

        return wrapped

    zero, half_pi = torch.zeros_like(T), torch.full_like(T, torch.pi / 2)
    condition = GuidedCondition(label, w, zero, half_pi)
    null = GuidedCondition(label + 1, torch.ones_like(w), zero, half_pi)
    net, goal = (to_rectified_flow(guidable(n)) for n in (base, base_target))
    point, derivative = torch.func.jvp(
        lambda r: x_u + ((r - u) * w)[:, None] * net(x_u, u, condition, end=r),
        (r,),
        (torch.ones_like(r),),
    )
    w_x = w[:, None]
    terminal = (derivative - w_x * goal(point, r, condition, end=r)).square().mean(1) / w**2
    v_g = w_x * (noise - x0) + (1 - w_x) * goal(x_r, r, null, end=r)
    flow_matching = (w_x * net(x_r, r, condition, end=r) - v_g).square().mean(1) / w**2

    loss = terminal_velocity_loss(
        scaled_by_guidance(guidable(base)),
        *(x0, noise, T, END, label),
        target=scaled_by_guidance(guidable(base_target)),
        guidance_scale=w,
        null_condition=lambda label: label + 1,
    )
    terminal = torch.where(END == T, 0.0, terminal)
    torch.testing.assert_close(loss.diagnostics["terminal"], terminal.detach())
    torch.testing.assert_close(loss.diagnostics["flow_matching"], flow_matching.detach())


# ---- gradients ---------------------------------------------------------------------------------


def without_gradient(function: Any, primals: Any, tangents: Any, scale: Any = None) -> Any:
    value, derivative = exact_jvp(function, primals, tangents, scale)
    return value, derivative.detach()


class HeldFixed:
    """A target whose mean velocity U is at every call what that of `net` was at the first."""

    def __init__(self, net: Network) -> None:
        self.net = net
        self.u: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor, condition: Any, end: Tensor) -> Tensor:
        if self.u is None:
            self.u = mean_velocity(self.net(x, t, condition, end=end), x, t)
        return f_of_velocity(self.u, x, t)


def small_dit() -> DiT:
    dit = DiT(size=4, dim=8, depth=1, heads=2, classes=3).double()
    for parameter in dit.parameters():  # some of them start at zero
        nn.init.normal_(parameter, std=0.2)
    return dit


@pytest.mark.parametrize("architecture", ["mlp", "dit"])
@DERIVATIVES
def test_gradient_through_the_tangent_is_the_finite_difference_of_the_loss(
    architecture: str, derivative: Derivative
) -> None:
    """With the target held at its value; each parameter moves by ± 1e-5."""
    net = SmoothNetwork(16).double() if architecture == "mlp" else small_dit()
    x0, noise = torch.randn(2, 7, 1, 4, 4, dtype=torch.float64)
    target = HeldFixed(net)
    options = {"target": target, "derivative": derivative}

    def loss(**changed: Any) -> Tensor:
        return terminal_velocity_loss(
            net, x0, noise, T, END, torch.arange(7) % 3, **{**options, **changed}
        ).value.sum()

    gradients = torch.autograd.grad(loss(), net.parameters())
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        for i in torch.randperm(parameter.numel())[:2].tolist():
            element = parameter.data.view(-1)[i : i + 1]
            start, values = element.clone(), []
            for h in (1e-5, -1e-5):
                element.copy_(start + h)
                values.append(loss().item())
            element.copy_(start)
            quotient = (values[0] - values[1]) / 2e-5
            assert gradient.view(-1)[i].item() == pytest.approx(quotient, abs=1e-6, rel=1e-6)

    # The tangent contributes to it.
    partial = torch.autograd.grad(loss(derivative=without_gradient), net.parameters())
    whole, rest = (torch.cat([g.flatten() for g in each]) for each in (gradients, partial))
    assert (whole - rest).norm() > 0.02 * whole.norm()


def test_central_difference_agrees_with_the_exact_derivative(case: Case) -> None:
    """In value and gradient, O(h²) where the end has room on both sides."""
    inside = END > 0

    def gradient(derivative: Derivative) -> Tensor:
        value = loss_of(case, derivative=derivative).value[inside].sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, case[0].parameters())])

    exact = gradient(exact_jvp)
    close, far = (
        (gradient(central_difference(h)) - exact).abs().max() / exact.abs().max()
        for h in (1e-3, 1e-2)
    )
    assert close < 1e-5
    assert 50 < far / close < 200


def test_only_the_student_gets_gradients(case: Case) -> None:
    student, target, _, _ = case
    loss_of(case).value.sum().backward()
    assert all(p.grad is None for p in target.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())


# ---- masks, training, arguments ----------------------------------------------------------------


def gradients_of(student: nn.Module, loss: Loss) -> list[Tensor]:
    student.zero_grad()
    loss.value.sum().backward()
    return [p.grad.clone() for p in student.parameters()]  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [2, 3])
def test_a_sample_with_nonfinite_data_is_masked_and_counted(
    case: Case, which: int, value: float
) -> None:
    student, target, x0, noise = case
    good = torch.tensor([0, 1, 3, 4, 5, 6])
    clean = terminal_velocity_loss(
        student, x0[good], noise[good], T[good], END[good], None, target=target
    )
    expected = gradients_of(student, clean)
    case[which][2, 3] = value
    loss = loss_of(case)
    assert loss.diagnostics["nonfinite"].tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert all(d[2] == 0 for name, d in loss.diagnostics.items() if name != "nonfinite")
    assert loss.value[2] == 0
    torch.testing.assert_close(loss.value[good], clean.value)
    torch.testing.assert_close(gradients_of(student, loss), expected)


def test_a_nonfinite_target_is_masked_and_counted(case: Case) -> None:
    def broken(x: Tensor, t: Tensor, condition: Any, end: Tensor) -> Tensor:
        return torch.where(t[:, None] > 1.2, float("nan"), x)

    loss = loss_of(case, target=broken)
    assert loss.diagnostics["nonfinite"].tolist() == (END > 1.2).double().tolist()
    assert all(gradient.isfinite().all() for gradient in gradients_of(case[0], loss))


def test_loss_has_gradients_under_autocast() -> None:
    """Also with the student as its own target: autocast must not reuse weights without gradient."""
    student = SmoothNetwork(5)
    x0, noise, t = torch.randn(6, 5), torch.randn(6, 5), torch.linspace(0.1, 1.5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = terminal_velocity_loss(student, x0, noise, t, 0.5 * t, None)
    assert loss.value.dtype == torch.float32
    assert all(gradient.abs().sum() > 0 for gradient in gradients_of(student, loss))


def test_training_from_data_gives_the_closed_form(
    gaussian: Gaussian, generator: torch.Generator
) -> None:
    student = SmoothNetwork(1, width=64)
    pairs, times = TruncatedEnd(), LogNormal(mean=-0.4, std=1.0)

    def loss(step: int) -> Loss:
        z, noise = torch.randn(2, 128, 1, generator=generator)
        return terminal_velocity_loss(
            student,
            gaussian.mean + gaussian.std * z,
            noise,
            *pairs(128, generator),
            None,
            flow_matching_times=times(128, generator),
        )

    train(student, 400, loss)
    assert max(flow_map_errors(student, gaussian, generator).values()) < 0.18


def test_invalid_arguments_raise() -> None:
    net, x, t = SmoothNetwork(5), torch.randn(6, 5), torch.linspace(0.1, 1.5, 6)

    def loss(noise: Tensor = x, t: Tensor = t, end: Tensor = t / 2, **options: Any) -> Loss:
        return terminal_velocity_loss(net, x, noise, t, end, None, **options)

    with pytest.raises(ValueError, match="noise has shape"):
        loss(noise=x[:, :4])
    with pytest.raises(ValueError, match="t lies in"):
        loss(t=t + 1)
    with pytest.raises(ValueError, match="end has shape"):
        loss(end=t[:3])
    with pytest.raises(ValueError, match="the end of a flow map lies in"):
        loss(end=t + 0.01)
    with pytest.raises(ValueError, match="one time per sample"):
        loss(flow_matching_times=t[:3])
    with pytest.raises(ValueError, match=r"terminal_weight is -1; it must be a number in \[0, inf"):
        loss(terminal_weight=-1)
    with pytest.raises(ValueError, match="flow_matching_weight is nan"):
        loss(flow_matching_weight=float("nan"))
    with pytest.raises(ValueError, match="guidance_scale needs a null_condition"):
        loss(guidance_scale=torch.ones(6))
    with pytest.raises(ValueError, match="guidance_scale is as low as 0; it must be positive"):
        loss(guidance_scale=torch.zeros(6), null_condition=lambda c: c)
    with pytest.raises(ValueError, match="guidance_scale has shape"):
        loss(guidance_scale=torch.ones(1), null_condition=lambda c: c)
