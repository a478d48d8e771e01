"""Classifier-free guidance: F_c + (w - 1) (F_c - F_u), where and as strong as it is asked for."""

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from rcm.guidance import Guidance, guided
from rcm.trigflow import Network
from tests.rcm.analytic_networks import Gaussian, SmoothNetwork

BATCH = 6


def conditional_network() -> Network:
    """F(x, t, condition, end) with a condition (batch, 4)."""
    net = SmoothNetwork(4).double().requires_grad_(False)

    def call(x: Tensor, t: Tensor, condition: Tensor, end: Tensor | None = None) -> Tensor:
        return net(x + condition, t if end is None else t - 2 * end)

    return call


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x, condition = torch.randn(2, BATCH, 4, dtype=torch.float64)
    return x, torch.linspace(0, torch.pi / 2, BATCH, dtype=torch.float64), condition


def test_guidance_extrapolates_from_the_null_condition(
    inputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    net, (x, t, condition) = conditional_network(), inputs
    c, u = net(x, t, condition), net(x, t, torch.zeros_like(condition))
    for scale in (0.0, 0.5, 5.0):
        f = guided(net, torch.zeros_like, scale)(x, t, condition)
        torch.testing.assert_close(f, u + scale * (c - u))


def test_guidance_of_gaussians_is_an_exact_velocity() -> None:
    """For equal variances and means m_c, m_u, the mean becomes m_u + w (m_c - m_u)."""

    def net(x: Tensor, t: Tensor, condition: float) -> Tensor:
        return Gaussian(mean=condition).velocity(x, t)

    x, t = torch.randn(7, 4, dtype=torch.float64), torch.linspace(0, 1.5, 7, dtype=torch.float64)
    f = guided(net, lambda _: 0.2, 3.0)(x, t, 0.5)
    torch.testing.assert_close(f, Gaussian(mean=0.2 + 3 * 0.3).velocity(x, t))


def test_a_negative_condition_of_each_sample_takes_the_place_of_the_empty_one(
    inputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    net, (x, t, positive), negative = conditional_network(), inputs, torch.randn(BATCH, 4)

    def net_of_pairs(x: Tensor, t: Tensor, condition: tuple[Tensor, Tensor]) -> Tensor:
        return net(x, t, condition[0])

    f = guided(net_of_pairs, lambda pair: (pair[1], pair[1]), 3.0)(x, t, (positive, negative))
    c, n = net(x, t, positive), net(x, t, negative)
    torch.testing.assert_close(f, n + 3 * (c - n))


def test_scale_1_is_exactly_the_conditional_network(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    net, (x, t, condition) = conditional_network(), inputs
    ones = torch.ones(BATCH)
    for scale in (1, 1.0, ones):
        for null in (torch.zeros_like, lambda c: c * float("nan")):
            assert torch.equal(guided(net, null, scale)(x, t, condition), net(x, t, condition))


def test_every_sample_has_its_own_scale(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    net, (x, t, condition) = conditional_network(), inputs
    scale = torch.tensor([0.0, 0.5, 1.0, 2.0, 5.0, 9.0])
    f = guided(net, torch.zeros_like, scale)(x, t, condition)
    for i, w in enumerate(scale.tolist()):
        alone = guided(net, torch.zeros_like, w)(x, t, condition)
        torch.testing.assert_close(f[i], alone[i])


def test_outside_of_the_interval_the_network_is_unguided(
    inputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    net, (x, t, condition) = conditional_network(), inputs
    low, high = t[2].item(), t[4].item()
    unlimited = guided(net, torch.zeros_like, 5.0)(x, t, condition)
    f = guided(net, torch.zeros_like, 5.0, (low, high))(x, t, condition)
    inside = torch.tensor([False, False, True, True, True, False])
    assert torch.equal(f[~inside], net(x, t, condition)[~inside])
    assert torch.equal(f[inside], unlimited[inside])


def test_every_sample_has_its_own_interval(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    net, (x, _, condition) = conditional_network(), inputs
    t = torch.full((BATCH,), 0.8, dtype=torch.float64)
    low = torch.tensor([0.0, 0.9, 0.0, 0.8, 0.1, 0.5])
    high = torch.tensor([1.5, 1.5, 0.7, 0.8, 0.2, 0.9])
    f = guided(net, torch.zeros_like, 5.0, (low, high))(x, t, condition)
    expected = torch.tensor([True, False, False, True, False, True])
    assert torch.equal((f != net(x, t, condition)).any(1), expected)


def test_the_interval_of_all_times_holds_the_ends_in_float32() -> None:
    """The float32 nearest to π/2 is above π/2."""
    net, t = conditional_network(), torch.tensor([0.0, torch.pi / 2])
    x, condition = torch.randn(2, 2, 4, dtype=torch.float64)
    f = guided(net, torch.zeros_like, 5.0, (0, torch.pi / 2))(x, t, condition)
    assert torch.equal(f, guided(net, torch.zeros_like, 5.0)(x, t, condition))


def test_guidance_is_differentiable_in_both_modes(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    net, (x, t, condition) = conditional_network(), inputs
    scale, direction = torch.linspace(1, 5, BATCH), torch.randn_like(x)
    with_guidance = guided(net, torch.zeros_like, scale, (0.3, 1.2))

    def derivative(net: Network, condition: Tensor) -> Tensor:
        ones = torch.ones_like(t)
        return torch.func.jvp(lambda x, t: net(x, t, condition), (x, t), (direction, ones))[1]

    c, u = derivative(net, condition), derivative(net, torch.zeros_like(condition))
    weight = torch.where((t >= 0.3) & (t <= 1.2), scale, 1.0)[:, None]
    torch.testing.assert_close(derivative(with_guidance, condition), u + weight * (c - u))
    assert torch.autograd.gradcheck(
        lambda x: with_guidance(x, t, condition), x.clone().requires_grad_()
    )


def test_the_end_of_a_jump_reaches_both_networks(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    net, (x, t, condition) = conditional_network(), inputs
    c, u = (net(x, t, label, end=t / 2) for label in (condition, torch.zeros_like(condition)))
    f = guided(net, torch.zeros_like, 3.0)(x, t, condition, end=t / 2)
    torch.testing.assert_close(f, u + 3 * (c - u))


def test_guidance_keeps_the_dtype_of_the_network() -> None:
    def net(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return x * condition

    x, condition = torch.ones(2, 3, dtype=torch.bfloat16), torch.full((2, 1), 3.0).bfloat16()
    f = guided(net, torch.zeros_like, 4.0)(x, torch.zeros(2), condition)
    torch.testing.assert_close(f, torch.full((2, 3), 12.0, dtype=torch.bfloat16))


# ---- the setting -------------------------------------------------------------------------------


def test_a_fixed_scale_is_that_of_every_sample(generator: Generator) -> None:
    state = generator.get_state()
    assert Guidance().draw(3, generator) is None
    scale = Guidance(scale=5.0).draw(3, generator)
    assert scale is not None and scale.tolist() == [5.0, 5.0, 5.0]
    assert torch.equal(generator.get_state(), state)
    assert not Guidance().active and Guidance(scale=5.0).active


def test_random_scales_are_uniform(generator: Generator) -> None:
    guidance = Guidance(scale=2.0, max_scale=14.0)
    scale = guidance.draw(4000, generator)
    assert scale is not None and guidance.active and Guidance(max_scale=2.0).active
    assert scale.dtype == torch.float64 and scale.min() >= 2 and scale.max() <= 14
    quantiles = torch.quantile(scale, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    expected = torch.tensor([5.0, 8.0, 11.0], dtype=torch.float64)
    torch.testing.assert_close(quantiles, expected, atol=0.3, rtol=0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"scale": -1.0}, "scale is -1.0; it must be a number in"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": 3.0, "max_scale": 3.0}, r"max_scale is 3.0; it must be a number in \(3, 1000"),
        ({"interval": (0.5,)}, "a tuple of 2 numbers"),
        ({"interval": (-0.1, 1.0)}, r"interval\[0\] is -0.1"),
        ({"interval": (0.5, 0.5)}, r"interval\[1\] is 0.5; it must be a number in \(0.5"),
        ({"interval": (0.5, 2.0)}, r"interval\[1\] is 2.0"),
    ],
)
def test_invalid_settings_raise(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**setting)


def test_invalid_scales_and_intervals_raise(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    net, (x, t, condition) = conditional_network(), inputs
    with pytest.raises(ValueError, match=r"scale is -2.0; it must be a number"):
        guided(net, torch.zeros_like, -2.0)
    with pytest.raises(ValueError, match=r"scale has shape \(6, 1\); expected .* \(6,\)"):
        guided(net, torch.zeros_like, torch.ones(BATCH, 1))(x, t, condition)
    with pytest.raises(ValueError, match=r"high has shape \(2,\)"):
        guided(net, torch.zeros_like, 5.0, (0.0, torch.ones(2)))(x, t, condition)
