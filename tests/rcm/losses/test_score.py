"""DMD moves samples from the critic's distribution to the teacher's."""

import torch
from torch import Tensor

from rcm.losses.score import score_loss
from rcm.time_sampling import LogNormal
from rcm.trigflow import denoise, interpolate
from tests.rcm.analytic_networks import Gaussian, SmoothNetwork


def test_gradient_is_twice_the_difference_of_the_denoisers_divided_by_the_error(
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


def test_samples_of_the_teachers_distribution_have_zero_gradient(gaussian: Gaussian) -> None:
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


def test_gradient_descent_moves_samples_to_the_teachers_distribution(
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


def test_divisor_is_at_least_1e_minus_5() -> None:
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
