"""Distribution matching moves samples from where the critic sees them to where the teacher does."""

import pytest
import torch
from torch import Tensor

from rcm.consistency import consistency_loss
from rcm.losses import Loss, flow_matching_loss
from rcm.sampling import consistency_sample
from rcm.score import rollout_times, score_loss
from rcm.times import LogNormal
from rcm.trigflow import denoise, interpolate
from tests.rcm.analytic_networks import Gaussian, SmoothNetwork


def test_gradient_is_twice_the_difference_of_the_denoisers_in_units_of_the_error(
    gaussian: Gaussian,
) -> None:
    fake = SmoothNetwork(5).double()
    generated = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(6, 5, dtype=torch.float64)
    t = torch.linspace(0.1, 1.5, 6, dtype=torch.float64)
    loss = score_loss(generated, noise, t, None, teacher=gaussian.velocity, fake_score=fake)
    loss.value.sum().backward()
    with torch.no_grad():
        x = interpolate(generated, noise, t)
        f_fake, f_teacher = denoise(fake, x, t, None), denoise(gaussian.velocity, x, t, None)
        mean_error = (generated - f_teacher).abs().mean(1, keepdim=True)
    torch.testing.assert_close(generated.grad, 2 * (f_fake - f_teacher) / mean_error)
    assert all(p.grad is None for p in fake.parameters())


def test_samples_of_the_right_distribution_feel_no_force(gaussian: Gaussian) -> None:
    generated = torch.randn(6, 5, requires_grad=True)
    loss = score_loss(
        generated,
        torch.randn(6, 5),
        torch.linspace(0.1, 1.5, 6),
        None,
        teacher=gaussian.velocity,
        fake_score=gaussian.velocity,
    )
    loss.value.sum().backward()
    assert generated.grad is not None
    assert not generated.grad.any()


def test_descent_carries_the_samples_to_the_teachers_distribution(
    gaussian: Gaussian, generator: torch.Generator
) -> None:
    """With exact critics the mean and spread of free samples become the teacher's."""
    samples = -1 + 1.3 * torch.randn(200, 64, generator=generator, dtype=torch.float64)
    draw = LogNormal(mean=0.0, std=1.0)
    for _ in range(300):
        critic = Gaussian(samples.mean().item(), samples.std().item())
        samples.requires_grad_()
        noise = torch.randn(samples.shape, generator=generator, dtype=torch.float64)
        loss = score_loss(
            samples,
            noise,
            draw(200, generator),
            None,
            teacher=gaussian.velocity,
            fake_score=critic.velocity,
        )
        (gradient,) = torch.autograd.grad(loss.value.sum(), samples)
        samples = samples.detach() - 0.02 * gradient
    assert abs(samples.mean() - gaussian.mean) < 0.03
    assert abs(samples.std() - gaussian.std) < 0.03


def test_the_error_that_divides_is_at_least_a_hundred_thousandth() -> None:
    """Teacher and sample agree exactly; the critic's x̂0 is off by sin(t) · 1e-5."""
    generated, t = torch.zeros(1, 5, requires_grad=True), torch.tensor([0.5])
    loss = score_loss(
        generated,
        torch.zeros(1, 5),
        t,
        None,
        teacher=lambda x, t, c: torch.zeros_like(x),
        fake_score=lambda x, t, c: torch.full_like(x, -1e-5),
    )
    loss.value.sum().backward()
    torch.testing.assert_close(generated.grad, 2 * torch.sin(t).expand(1, 5))


def test_nonfinite_samples_are_masked_and_counted(gaussian: Gaussian) -> None:
    def broken(x: Tensor, t: Tensor, condition: object) -> Tensor:
        return torch.where(t.view(-1, 1) > 1, float("inf"), x)

    generated = torch.randn(2, 5, requires_grad=True)
    loss = score_loss(
        generated,
        torch.randn(2, 5),
        torch.tensor([0.5, 1.5]),
        None,
        teacher=gaussian.velocity,
        fake_score=broken,
    )
    loss.value.sum().backward()
    assert loss.diagnostics["dmd_nonfinite"].tolist() == [0, 1]
    assert generated.grad is not None
    assert generated.grad.isfinite().all()
    assert generated.grad[0].any()
    assert not generated.grad[1].any()


def test_rollout_times_start_at_noise_and_never_increase(generator: torch.Generator) -> None:
    t = rollout_times(4, 1000, LogNormal(mean=0.0, std=1.6), generator)
    assert t.shape == (4, 1000)
    assert t.dtype == torch.float64
    assert (t[0] == torch.pi / 2).all()
    assert (t.diff(dim=0) <= 0).all()
    assert (t.diff(dim=0) < 0).any()
    with pytest.raises(ValueError, match="at least one step"):
        rollout_times(0, 4, LogNormal(mean=0.0, std=1.6), generator)


def test_only_the_last_step_of_a_rollout_carries_gradients(generator: torch.Generator) -> None:
    weights = torch.ones(3, requires_grad=True)
    calls = iter(range(3))

    def student(x: Tensor, t: Tensor, condition: object) -> Tensor:
        return weights[next(calls)] * x

    times = rollout_times(3, 6, LogNormal(mean=0.0, std=1.6), generator)
    sample = consistency_sample(student, torch.randn(6, 5), times, None, fresh=generator)
    (gradient,) = torch.autograd.grad(sample.square().sum(), weights)
    assert gradient[:2].tolist() == [0, 0]
    assert gradient[2] != 0


def test_losses_add_like_formulas(gaussian: Gaussian) -> None:
    student = SmoothNetwork(5)
    x0, noise, t = torch.randn(6, 5), torch.randn(6, 5), torch.linspace(0.1, 1.5, 6)
    consistency = consistency_loss(student, x0, noise, t, None, tangent_norm="l2")
    score = score_loss(
        student(noise, t), noise, t, None, teacher=gaussian.velocity, fake_score=student
    )
    total = consistency + 0.01 * score
    torch.testing.assert_close(total.value, consistency.value + 0.01 * score.value)
    assert total.diagnostics.keys() == consistency.diagnostics.keys() | score.diagnostics.keys()
    with pytest.raises(ValueError, match="both losses report"):
        consistency + consistency
    with pytest.raises(ValueError, match="must be equal"):
        consistency + Loss(torch.zeros(3), {})


def test_flow_matching_is_least_at_the_exact_velocity(
    gaussian: Gaussian, generator: torch.Generator
) -> None:
    z, noise = torch.randn(2, 20_000, 1, generator=generator)
    x0, t = gaussian.mean + gaussian.std * z, LogNormal(mean=0.0, std=1.0)(20_000, generator)

    def loss(scale: float, offset: float) -> float:
        def net(x: Tensor, t: Tensor, condition: object) -> Tensor:
            return scale * gaussian.velocity(x, t) + offset * x

        return flow_matching_loss(net, x0, noise, t, None).value.mean().item()

    least = loss(1.0, 0.0)
    for scale, offset in [(1.04, 0.0), (0.96, 0.0), (1.0, 0.04), (1.0, -0.04)]:
        assert loss(scale, offset) > least + 1e-4
