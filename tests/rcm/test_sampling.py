"""Samplers of a Gaussian, whose ODE and consistency function have closed forms."""

import pytest
import torch
from torch import Tensor

from rcm.sampling import (
    consistency_sample,
    consistency_times,
    flow_map_sample,
    heun_sample,
    heun_times,
)
from rcm.time_sampling import LogNormal, rollout_times
from rcm.trigflow import denoise
from tests.rcm.analytic_networks import Gaussian


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_exact_consistency_function_samples_the_exact_gaussian(
    steps: int, gaussian: Gaussian, generator: torch.Generator
) -> None:
    noise = torch.randn(100_000, 2, generator=generator)
    samples = consistency_sample(
        gaussian.consistency, noise, consistency_times(steps), None, noise_source=generator
    )
    covariance = gaussian.std**2 * torch.eye(2)
    torch.testing.assert_close(samples.mean(0), torch.full((2,), 0.7), atol=6e-3, rtol=0)
    torch.testing.assert_close(torch.cov(samples.T), covariance, atol=6e-3, rtol=0)


def test_one_consistency_step_is_the_end_of_the_ode(gaussian: Gaussian) -> None:
    noise = torch.randn(9, 2, dtype=torch.float64)
    sample = consistency_sample(gaussian.consistency, noise, consistency_times(1), None)
    ode = heun_sample(gaussian.velocity, noise, heun_times(2000), None)
    torch.testing.assert_close(sample, ode, atol=1e-5, rtol=0)


def test_heuns_method_is_of_second_order(gaussian: Gaussian) -> None:
    noise = torch.randn(9, 2, dtype=torch.float64)
    t = heun_times(1)[:1].expand(9)
    exact = gaussian.ode_end(torch.sin(t)[:, None] * noise, t)
    errors = torch.stack(
        [
            (heun_sample(gaussian.velocity, noise, heun_times(n), None) - exact).abs().max()
            for n in (40, 80, 160)
        ]
    )
    order = torch.log2(errors[:-1] / errors[1:])
    torch.testing.assert_close(order, torch.full((2,), 2.0).double(), atol=0.15, rtol=0)


def test_one_heun_step_is_the_denoiser(gaussian: Gaussian) -> None:
    noise, t = torch.randn(9, 2, dtype=torch.float64), heun_times(1)[:1].expand(9)
    blurry = denoise(gaussian.velocity, torch.sin(t)[:, None] * noise, t, None)
    torch.testing.assert_close(heun_sample(gaussian.velocity, noise, heun_times(1), None), blurry)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_exact_flow_map_ends_where_the_ode_does_in_any_number_of_steps(
    steps: int, gaussian: Gaussian
) -> None:
    noise, times = torch.randn(9, 2, dtype=torch.float64), heun_times(steps)
    t = times[:1].expand(9)
    ends = []

    def net(x: Tensor, t: Tensor, condition: object, end: Tensor) -> Tensor:
        ends.append(end[0].item())
        return gaussian.flow_map_network(x, t, condition, end)

    sample = flow_map_sample(net, noise, times, None)
    torch.testing.assert_close(sample, gaussian.ode_end(torch.sin(t)[:, None] * noise, t))
    assert ends == times[1:].tolist()


def test_two_steps_denoise_add_noise_and_denoise(gaussian: Gaussian) -> None:
    first, second = torch.randn(2, 4, 2, dtype=torch.float64)
    times = consistency_times(2, mid_times=(0.8,))
    t1, t2 = times[:, None].expand(-1, 4)
    x0 = denoise(gaussian.consistency, torch.sin(t1)[:, None] * first, t1, None)
    x = torch.cos(t2)[:, None] * x0 + torch.sin(t2)[:, None] * second
    sample = consistency_sample(gaussian.consistency, first, times, None, noise_source=[second])
    torch.testing.assert_close(sample, denoise(gaussian.consistency, x, t2, None))


def test_given_noise_is_used_in_order(gaussian: Gaussian) -> None:
    generator = torch.Generator().manual_seed(3)
    noise, times = torch.randn(4, 2), consistency_times(3)
    drawn = consistency_sample(gaussian.consistency, noise, times, None, noise_source=generator)
    generator.manual_seed(3)
    fresh = [torch.randn(4, 2, generator=generator) for _ in range(2)]
    given = consistency_sample(gaussian.consistency, noise, times, None, noise_source=fresh)
    torch.testing.assert_close(given, drawn)
    swapped = consistency_sample(gaussian.consistency, noise, times, None, noise_source=fresh[::-1])
    assert not torch.allclose(swapped, drawn)


def test_times_may_differ_between_samples(gaussian: Gaussian) -> None:
    noise, fresh = torch.randn(2, 3), [torch.randn(2, 3)]
    times = torch.tensor([[1.5, 1.4], [0.9, 0.3]], dtype=torch.float64)
    both = consistency_sample(gaussian.consistency, noise, times, None, noise_source=fresh)
    for i in range(2):
        alone = consistency_sample(
            gaussian.consistency,
            noise[i, None],
            times[:, i],
            None,
            noise_source=[fresh[0][i, None]],
        )
        torch.testing.assert_close(both[i, None], alone)


def test_only_the_last_step_of_a_rollout_carries_gradients(generator: torch.Generator) -> None:
    weights = torch.ones(3, requires_grad=True)
    calls = iter(range(3))

    def student(x: Tensor, t: Tensor, condition: object) -> Tensor:
        return weights[next(calls)] * x

    times = rollout_times(3, 6, LogNormal(mean=0.0, std=1.6), generator)
    sample = consistency_sample(student, torch.randn(6, 5), times, None, noise_source=generator)
    (gradient,) = torch.autograd.grad(sample.square().sum(), weights)
    assert gradient[:2].tolist() == [0, 0]
    assert gradient[2] != 0


def test_schedules_are_float64_from_sigma_max_to_zero() -> None:
    times: Tensor = consistency_times(4, sigma_max=40, sigma_data=0.5)
    assert times.dtype == heun_times(8).dtype == torch.float64
    torch.testing.assert_close(torch.tan(times[0]), torch.tensor(80.0).double())
    assert times[1:].tolist() == [1.5, 1.4, 1.0]
    assert heun_times(8)[-1] == 0
    assert len(heun_times(8)) == 9


def test_invalid_schedules_raise(gaussian: Gaussian) -> None:
    noise = torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"it must be in 1\.\.4"):
        consistency_times(5)
    with pytest.raises(ValueError, match="must decrease"):
        consistency_times(3, mid_times=(1.0, 1.2))
    with pytest.raises(ValueError, match="2 steps need a generator or 1 tensors"):
        consistency_sample(gaussian.consistency, noise, consistency_times(2), None)
    with pytest.raises(ValueError, match=r"noise_source\[0\] has shape \(4, 1\)"):
        consistency_sample(
            gaussian.consistency,
            noise,
            consistency_times(2),
            None,
            noise_source=[torch.randn(4, 1)],
        )
    with pytest.raises(ValueError, match="decrease to 0"):
        heun_sample(gaussian.velocity, noise, heun_times(4)[:-1], None)
    with pytest.raises(ValueError, match="decrease to 0 in at least one step, got "):
        flow_map_sample(gaussian.flow_map_network, noise, torch.tensor([1.0, 1.2, 0.0]), None)
    with pytest.raises(ValueError, match=r"at least one step, got \[0.0\]"):
        flow_map_sample(gaussian.flow_map_network, noise, heun_times(1)[1:], None)
    with pytest.raises(ValueError, match="at least one"):
        heun_times(0)
