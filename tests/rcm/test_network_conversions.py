"""Networks of rectified flow, EDM and DDPM are TrigFlow networks after a conversion, exactly."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rcm.losses.consistency import consistency_tangent
from rcm.network_conversions import (
    from_edm,
    from_rectified_flow,
    from_vp,
    to_edm,
    to_rectified_flow,
    to_vp,
)
from rcm.predictions import Prediction
from rcm.time_conversions import VPSchedule, sigma_from_t, t_from_sigma, u_from_t
from rcm.trigflow import Network, cos_sin, interpolate, velocity
from tests.rcm.analytic_networks import Gaussian, SmoothNetwork

DDPM = VPSchedule.scaled_linear()
VP_KINDS: tuple[Prediction, ...] = ("eps", "v", "x0")

# Each conversion and the times at which it is defined.
EVERY_TIME = torch.linspace(0, torch.pi / 2, 101, dtype=torch.float64)
EDM_TIMES = t_from_sigma(torch.logspace(-2.7, 1.9, 101, dtype=torch.float64), 0.5)  # σ .002 to 80
VP_TIMES = DDPM.t(torch.linspace(0, 999, 101, dtype=torch.float64))
Convert = Callable[[Network], Network]
CONVERSIONS: dict[str, tuple[Convert, Convert, Tensor]] = {
    "rectified flow": (from_rectified_flow, to_rectified_flow, EVERY_TIME),
    "rectified flow, 1000 u": (
        lambda net: from_rectified_flow(net, time_scale=1000),
        lambda net: to_rectified_flow(net, time_scale=1000),
        EVERY_TIME,
    ),
    "EDM": (from_edm, to_edm, EDM_TIMES),
    "EDM, σd = 3": (lambda net: from_edm(net, 3.0), lambda net: to_edm(net, 3.0), EDM_TIMES),
    **{
        f"DDPM, {kind}": (
            lambda net, kind=kind: from_vp(net, DDPM, kind),
            lambda net, kind=kind: to_vp(net, DDPM, kind),
            VP_TIMES,
        )
        for kind in VP_KINDS
    },
}
every_conversion = pytest.mark.parametrize(
    ("from_", "to", "t"), CONVERSIONS.values(), ids=CONVERSIONS
)


def smooth_network() -> SmoothNetwork:
    return SmoothNetwork(4).double().requires_grad_(False)


def two_time_network() -> Network:
    """F(x, t, end) of a smooth network of t and of end."""
    first, second = smooth_network(), smooth_network()

    def net(x: Tensor, t: Tensor, condition: object, end: Tensor | None = None) -> Tensor:
        return first(x, t) + second(x, t if end is None else end)

    return net


def inputs(t: Tensor) -> Tensor:
    return torch.randn(len(t), 4, dtype=torch.float64)


# ---- round trips -------------------------------------------------------------------------------


@every_conversion
def test_converting_a_network_and_back_gives_it_back(
    from_: Convert, to: Convert, t: Tensor
) -> None:
    net, x = smooth_network(), inputs(t)
    actual = from_(to(net))(x, t, None)
    torch.testing.assert_close(actual, net(x, t), atol=1e-12, rtol=1e-12)


def test_converting_a_network_through_all_conventions_gives_it_back() -> None:
    net, x = smooth_network(), inputs(VP_TIMES)
    converted: Network = net
    for from_, to, _ in CONVERSIONS.values():
        converted = from_(to(converted))
    actual = converted(x, VP_TIMES, None)
    torch.testing.assert_close(actual, net(x, VP_TIMES), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["rectified flow", "rectified flow, 1000 u", "EDM"])
def test_converting_a_flow_map_and_back_gives_it_back(name: str) -> None:
    from_, to, t = CONVERSIONS[name]
    net, x = two_time_network(), inputs(t)
    for end in (t, t / 2, 0 * t):
        actual = from_(to(net))(x, t, None, end=end)
        torch.testing.assert_close(actual, net(x, t, None, end=end), atol=1e-12, rtol=1e-12)


def test_the_inverse_conversion_of_rectified_flow_also_comes_first() -> None:
    net = two_time_network()
    u, x = torch.linspace(0, 1, 11, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    actual = to_rectified_flow(from_rectified_flow(net))(x, u, None, end=u / 3)
    torch.testing.assert_close(actual, net(x, u, None, end=u / 3), atol=1e-12, rtol=1e-12)


# ---- an exact teacher --------------------------------------------------------------------------


def posterior(x: Tensor, signal: Tensor, noise: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """E[x0 | x] and E[ε | x] of Gaussian data in its own units, at x = signal·x0 + noise·ε."""
    data, a, s = Gaussian(), signal[:, None], noise[:, None]
    mean, std = sigma_data * data.mean, sigma_data * data.std
    centred = (x - a * mean) / ((a * std) ** 2 + s**2)
    return mean + a * std**2 * centred, s * centred


def gaussian_rectified_flow(x: Tensor, t: Tensor, condition: object) -> Tensor:
    u = t / 1000
    x0, eps = posterior(x, 1 - u, u, 1.0)
    return eps - x0


def gaussian_edm(x: Tensor, t: Tensor, condition: object) -> Tensor:
    return posterior(x, torch.ones_like(t), t, 0.5)[0]


def gaussian_vp(kind: Prediction) -> Network:
    def net(x: Tensor, t: Tensor, condition: object) -> Tensor:
        a, s = torch.cos(DDPM.t(t)), torch.sin(DDPM.t(t))
        x0, eps = posterior(x, a, s, 1.0)
        return {"x0": x0, "eps": eps, "v": a[:, None] * eps - s[:, None] * x0}[kind]

    return net


@pytest.mark.parametrize(
    ("convention", "net"),
    [
        ("rectified flow, 1000 u", gaussian_rectified_flow),
        ("EDM", gaussian_edm),
        *((f"DDPM, {kind}", gaussian_vp(kind)) for kind in VP_KINDS),
    ],
)
def test_an_exact_teacher_of_each_convention_is_the_exact_trigflow_teacher(
    convention: str, net: Network, gaussian: Gaussian
) -> None:
    from_, _, t = CONVERSIONS[convention]
    x = inputs(t)
    torch.testing.assert_close(
        from_(net)(x, t, None), gaussian.velocity(x, t), atol=1e-11, rtol=1e-11
    )


def test_wrapped_flow_network_predicts_the_trigflow_velocity() -> None:
    """For the exact prediction ε - x0."""
    x0, eps = torch.randn(2, 101, 4, dtype=torch.float64)
    f = from_rectified_flow(lambda x, t, condition: eps - x0)(
        interpolate(x0, eps, EVERY_TIME), EVERY_TIME, None
    )
    torch.testing.assert_close(f, velocity(x0, eps, EVERY_TIME))


def test_rectified_flow_wrapper_is_exact_and_finite_at_both_ends(times: Tensor) -> None:
    net, x = smooth_network(), inputs(times)
    c, s = torch.cos(times)[:, None], torch.sin(times)[:, None]
    z = c + s
    literal = (c - s) / z * x + net(x / z, u_from_t(times)) / z
    torch.testing.assert_close(from_rectified_flow(net)(x, times, None), literal)


# ---- flow maps ---------------------------------------------------------------------------------


def ode_solution(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x at s on the ODE of Gaussian data through (x, t), in TrigFlow."""
    data = Gaussian()
    scale = data.spread(s, x) / data.spread(t, x)
    return cos_sin(s, x)[0] * data.mean + scale * (x - cos_sin(t, x)[0] * data.mean)


def gaussian_mean_velocity(
    x: Tensor, t: Tensor, condition: object, end: Tensor | None = None
) -> Tensor:
    """U(x, u, r) = (x - x_r) / (u - r) of Gaussian data, for r < u."""
    assert end is not None
    data, u, r = Gaussian(), t[:, None], end[:, None]

    def spread(u: Tensor) -> Tensor:
        return torch.sqrt(((1 - u) * data.std) ** 2 + u**2)

    x_r = (1 - r) * data.mean + spread(r) / spread(u) * (x - (1 - u) * data.mean)
    return (x - x_r) / (u - r)


def test_mean_velocity_of_rectified_flow_is_a_jump_of_trigflow() -> None:
    """cos(t - s) x - sin(t - s) F is the solution of the ODE, for the wrapped F."""
    t = EVERY_TIME[1:]
    x, net = inputs(t), from_rectified_flow(gaussian_mean_velocity)
    for s in (0 * t, t / 3, 0.9 * t):
        cos, sin = cos_sin(t - s, x)
        jump = cos * x - sin * net(x, t, None, end=s)
        torch.testing.assert_close(jump, ode_solution(x, t, s), atol=1e-12, rtol=1e-12)


def test_mean_velocity_of_a_trigflow_jump_is_that_of_rectified_flow() -> None:
    def flow_map(x: Tensor, t: Tensor, condition: object, end: Tensor | None = None) -> Tensor:
        assert end is not None
        cos, sin = cos_sin(t - end, x)
        return (cos * x - ode_solution(x, t, end)) / sin

    u = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    x = torch.randn(20, 4, dtype=torch.float64)
    for r in (0 * u, u / 3, 0.9 * u):
        actual = to_rectified_flow(flow_map, time_scale=1000)(x, 1000 * u, None, end=1000 * r)
        expected = gaussian_mean_velocity(x, u, None, end=r)
        torch.testing.assert_close(actual, expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", ["rectified flow, 1000 u", "EDM"])
def test_networks_receive_the_end_of_a_jump_in_their_own_time(name: str) -> None:
    from_, _, t = CONVERSIONS[name]
    seen: list[tuple[Tensor, Tensor | None]] = []

    def net(x: Tensor, t: Tensor, condition: object, end: Tensor | None = None) -> Tensor:
        seen.append((t, end))
        return x

    from_(net)(inputs(t), t, None, end=t)
    time, end = seen[0]
    assert end is not None
    torch.testing.assert_close(end, time)


# ---- derivatives -------------------------------------------------------------------------------


@every_conversion
def test_the_tangent_of_a_converted_network_is_exact(
    from_: Convert, to: Convert, t: Tensor
) -> None:
    """It is the tangent of the network that conversions to and fro give back, and a derivative."""
    t = DDPM.t(torch.arange(50, 950, 100) + 0.5)  # between two timesteps, t is smooth
    net, x = smooth_network(), inputs(t)
    converted, direction = from_(to(net)), (inputs(t), torch.randn_like(t))

    def along(step: float) -> Tensor:
        return converted(x + step * direction[0], t + step * direction[1], None)

    _, tangent = torch.func.jvp(lambda x, t: converted(x, t, None), (x, t), direction)
    _, expected = torch.func.jvp(net, (x, t), direction)
    torch.testing.assert_close(tangent, expected, atol=1e-10, rtol=1e-10)
    difference = (along(1e-5) - along(-1e-5)) / 2e-5
    torch.testing.assert_close(tangent, difference, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["rectified flow", "rectified flow, 1000 u", "EDM"])
def test_the_tangent_of_a_converted_flow_map_is_exact_in_both_times(name: str) -> None:
    from_, to, t = CONVERSIONS[name]
    net, x, t = two_time_network(), inputs(t[10:-10]), t[10:-10]
    direction = inputs(t), torch.randn_like(t), torch.randn_like(t)
    tangents = [
        torch.func.jvp(
            lambda x, t, end, f=f: f(x, t, None, end=end),  # type: ignore[misc]
            (x, t, t / 3),
            direction,
        )[1]
        for f in (from_(to(net)), net)
    ]
    torch.testing.assert_close(*tangents, atol=1e-10, rtol=1e-10)


@every_conversion
def test_the_tangent_of_a_network_of_each_convention_is_a_derivative(
    from_: Convert, to: Convert, t: Tensor
) -> None:
    t = DDPM.t(torch.arange(50, 950, 100) + 0.5)
    net, x = smooth_network(), inputs(t)
    converted = from_(lambda x, t, condition: net(x.sin(), t / (1 + t.square()).sqrt()))
    direction = inputs(t), torch.randn_like(t)

    def along(step: float) -> Tensor:
        return converted(x + step * direction[0], t + step * direction[1], None)

    _, tangent = torch.func.jvp(lambda x, t: converted(x, t, None), (x, t), direction)
    difference = (along(1e-6) - along(-1e-6)) / 2e-6
    torch.testing.assert_close(tangent, difference, atol=1e-5, rtol=1e-5)


def test_tangent_of_a_wrapped_flow_network_equals_the_rectified_flow_formula(times: Tensor) -> None:
    """g = C h / Z², where h = V - v - u J differentiates x_u - u v along (V, 1)."""
    student, teacher = SmoothNetwork(4).double(), SmoothNetwork(4).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    c, s = torch.cos(times)[:, None], torch.sin(times)[:, None]
    z = c + s
    u = u_from_t(times)
    flow = teacher(x / z, u)
    v, j = torch.func.jvp(student, (x / z, u), (flow, torch.ones_like(u)))
    h = flow - v - u[:, None] * j

    teacher_f = from_rectified_flow(teacher)(x, times, None)
    wrapped = consistency_tangent(from_rectified_flow(student), x, times, teacher_f, None)
    torch.testing.assert_close(wrapped.g, c * h / z**2, atol=1e-10, rtol=1e-10)


# ---- times and errors ----------------------------------------------------------------------------


def test_networks_receive_their_time_from_float64_in_float32_at_least() -> None:
    """u of a float32 t is computed in float64, then rounded once."""
    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor, condition: object) -> Tensor:
        seen.append(t)
        return x

    t = VP_TIMES.float()
    wrapped = {
        "flow": (from_rectified_flow(net, time_scale=1000), 1000 * u_from_t(t.double())),
        "EDM": (from_edm(net), sigma_from_t(t.double(), 0.5)),
        "DDPM": (from_vp(net, DDPM), DDPM.timestep(t)),
    }
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for converted, time in wrapped.values():
            f = converted(torch.ones(101, 4, dtype=dtype), t, None)
            precise = torch.promote_types(dtype, torch.float32)
            assert f.dtype == precise
            torch.testing.assert_close(seen.pop(), time.to(precise), atol=0, rtol=0)


def test_integer_timesteps_are_the_nearest() -> None:
    def net(x: Tensor, t: Tensor, condition: object) -> Tensor:
        assert t.dtype == torch.int64
        return t[:, None] * torch.ones_like(x)

    t = DDPM.t(torch.tensor([0.0, 17.4, 17.6, 999.0]))
    f = from_vp(net, DDPM, "v", integer_timesteps=True)(torch.ones(4, 1), t, None)
    assert f[:, 0].round().tolist() == [0, 17, 18, 999]


def test_times_where_a_prediction_does_not_determine_f_raise() -> None:
    x, net = torch.ones(1, 2), smooth_network()
    start, end = torch.zeros(1), torch.full((1,), torch.pi / 2)
    with pytest.raises(ValueError, match=r"sin\(t\) is 0; .* does not determine F"):
        from_edm(net)(x, start, None)
    with pytest.raises(ValueError, match="σ is infinite at t = π/2"):
        from_edm(net)(x, end, None)
    pure_noise = VPSchedule(torch.tensor([0.9, 0.5, 0.0]))
    no_noise = VPSchedule(torch.tensor([1.0, 0.5, 0.1]))
    with pytest.raises(ValueError, match="ε at the schedule's ᾱ = 0 does not determine F"):
        from_vp(net, pure_noise, "eps")
    with pytest.raises(ValueError, match="x0 at the schedule's ᾱ = 1 does not determine F"):
        from_vp(net, no_noise, "x0")
    for schedule, times in ((pure_noise, end), (no_noise, start)):
        assert from_vp(lambda x, t, condition: x, schedule, "v")(x, times, None).isfinite().all()


def test_times_outside_of_the_schedule_and_invalid_settings_raise() -> None:
    x, t, net = torch.ones(1, 2), torch.full((1,), 1.2), smooth_network()
    with pytest.raises(ValueError, match="t lies in"):
        from_vp(net, DDPM)(x, torch.full((1,), torch.pi / 2), None)
    with pytest.raises(ValueError, match="timestep lies in"):
        to_vp(net, DDPM)(x, torch.full((1,), 1000.0), None)
    for convert in (from_vp, to_vp):
        with pytest.raises(ValueError, match="do not reach end = 0"):
            convert(net, DDPM)(x, t, None, end=t)
        with pytest.raises(ValueError, match="prediction is 'score'; it must be one of x0, eps"):
            convert(net, DDPM, "score")  # type: ignore[arg-type]
    for invalid in (0.0, -1.0, float("nan")):
        for convert_scale in (from_rectified_flow, to_rectified_flow, from_edm, to_edm):
            with pytest.raises(ValueError, match="must be a number in"):
                convert_scale(net, invalid)
