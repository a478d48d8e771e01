"""LCM: x itself at timestep 0, one DDIM step of the teacher, a pseudo-Huber distance."""

import pytest
import torch
from torch import Tensor

from rcm.guidance import guided
from rcm.losses.lcm import lcm_loss, lcm_network, lcm_timesteps
from rcm.predictions import f_from_prediction
from rcm.sampling import consistency_sample
from rcm.time_conversions import VPSchedule
from rcm.trigflow import Network, denoise
from tests.rcm.analytic_networks import Gaussian, SmoothNetwork

TIMESTEP = torch.tensor([19, 199, 399, 599, 799, 999])


@pytest.fixture
def schedule() -> VPSchedule:
    return VPSchedule.scaled_linear()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """x0, noise (6, 5), float64."""
    x0, noise = torch.randn(2, 6, 5, dtype=torch.float64)
    return x0, noise


def scalings(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip, c_out (batch, 1)."""
    s = 10 * timestep[:, None].double()
    return 0.25 / (s**2 + 0.25), s / torch.sqrt(s**2 + 0.25)


def exact_student(gaussian: Gaussian, schedule: VPSchedule) -> Network:
    """f = the point at timestep 0 of the ODE through (x, t)."""

    def net(x: Tensor, t: Tensor, condition: object, end: Tensor | None = None) -> Tensor:
        c_skip, c_out = scalings(schedule.timestep(t))
        point = gaussian.ode_point(x, t, schedule.times[0].expand(len(t)))
        x0 = (point - c_skip * x) / c_out
        return (torch.cos(t)[:, None] * x - x0) / torch.sin(t)[:, None]

    return net


def test_f_mixes_the_input_and_the_data_prediction(schedule: VPSchedule) -> None:
    net, x = SmoothNetwork(5).double(), torch.randn(6, 5, dtype=torch.float64)
    timestep = torch.tensor([0, 1, 2, 19, 500, 999])
    t, (c_skip, c_out) = schedule.t(timestep), scalings(timestep)
    f = denoise(lcm_network(net, schedule), x, t, None)
    torch.testing.assert_close(f, c_skip * x + c_out * denoise(net, x, t, None))


def test_f_is_the_input_at_timestep_zero(schedule: VPSchedule) -> None:
    net, x, t = SmoothNetwork(5), torch.randn(6, 5), schedule.t(torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(denoise(lcm_network(net, schedule), x, t, None), x)


def test_loss_is_the_pseudo_huber_distance_after_a_ddim_step(
    schedule: VPSchedule, data: tuple[Tensor, Tensor]
) -> None:
    """DDIM in DDPM's notation: √ᾱ' x̂0 + √(1 - ᾱ') ε̂."""
    student, teacher, target = (SmoothNetwork(5).double() for _ in range(3))
    following = (TIMESTEP - 20).clamp(min=0)
    t, t_next = schedule.t(TIMESTEP), schedule.t(following)
    signal, noise = torch.cos(t)[:, None], torch.sin(t)[:, None]
    x = signal * data[0] + noise * data[1]
    x0 = denoise(teacher, x, t, None)
    eps = (x - signal * x0) / noise
    x_next = torch.cos(t_next)[:, None] * x0 + torch.sin(t_next)[:, None] * eps

    (c_skip, c_out), (c_skip_next, c_out_next) = scalings(TIMESTEP), scalings(following)
    f = c_skip * x + c_out * denoise(student, x, t, None)
    f_next = c_skip_next * x_next + c_out_next * denoise(target, x_next, t_next, None)
    for c in (1e-3, 1.0):
        expected = (torch.sqrt((f - f_next) ** 2 + c**2) - c).mean(1)
        loss = lcm_loss(
            student,
            *data,
            TIMESTEP,
            following,
            None,
            schedule=schedule,
            teacher=teacher,
            target=target,
            huber_c=c,
        )
        torch.testing.assert_close(loss.value, expected)
        torch.testing.assert_close(loss.diagnostics["lcm"], expected)


def test_each_sample_can_have_its_own_guidance_scale(
    schedule: VPSchedule, data: tuple[Tensor, Tensor]
) -> None:
    student, teacher = SmoothNetwork(5).double(), SmoothNetwork(5).double()
    condition = torch.randn(6, 5, dtype=torch.float64)
    scale = torch.tensor([1.0, 2.0, 3.0, 5.0, 8.0, 15.0], dtype=torch.float64)

    def conditional(x: Tensor, t: Tensor, condition: Tensor, end: Tensor | None = None) -> Tensor:
        return teacher(x, t) + condition

    def value(samples: slice, w: float | Tensor) -> Tensor:
        return lcm_loss(
            student,
            data[0][samples],
            data[1][samples],
            TIMESTEP[samples],
            TIMESTEP[samples] - 10,
            condition[samples],
            schedule=schedule,
            teacher=guided(conditional, torch.zeros_like, w),
        ).value

    together = value(slice(None), scale)
    for i in range(6):
        torch.testing.assert_close(value(slice(i, i + 1), scale[i].item())[0], together[i])
    assert not torch.isclose(together[1:], value(slice(None), 1.0)[1:], rtol=1e-3).any()


def test_only_f_of_the_student_carries_gradients(
    schedule: VPSchedule, data: tuple[Tensor, Tensor]
) -> None:
    """The student as its own target has the gradient of a frozen copy as target."""
    student, copy, teacher = (SmoothNetwork(5).double() for _ in range(3))
    copy.load_state_dict(student.state_dict())
    gradients = []
    for target in (None, copy):
        loss = lcm_loss(
            student,
            *data,
            TIMESTEP,
            TIMESTEP - 10,
            None,
            schedule=schedule,
            teacher=teacher,
            target=target,
        )
        student.zero_grad()
        loss.value.sum().backward()
        gradients.append([p.grad for p in student.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
    assert all(p.grad is None for net in (copy, teacher) for p in net.parameters())


def test_error_of_the_exact_consistency_function_is_that_of_a_ddim_step(
    gaussian: Gaussian, schedule: VPSchedule, data: tuple[Tensor, Tensor]
) -> None:
    """One step over a gap δ has an error of δ², so that d is four times smaller for δ/2."""
    timestep = torch.full((6,), 800)
    errors = torch.stack(
        [
            lcm_loss(
                exact_student(gaussian, schedule),
                *data,
                timestep,
                timestep - gap,
                None,
                schedule=schedule,
                teacher=gaussian.velocity,
                huber_c=1e3,  # the loss is then d² / 2000
            )
            .value.sum()
            .sqrt()
            for gap in (32, 16, 8)
        ]
    )
    order = torch.log2(errors[:-1] / errors[1:])
    torch.testing.assert_close(order, torch.full_like(order, 2), atol=0.15, rtol=0)


def test_exact_consistency_function_has_a_much_smaller_loss_than_the_denoiser(
    gaussian: Gaussian, schedule: VPSchedule, data: tuple[Tensor, Tensor]
) -> None:
    exact, denoiser = (
        lcm_loss(
            student,
            *data,
            TIMESTEP,
            TIMESTEP - 1,
            None,
            schedule=schedule,
            teacher=gaussian.velocity,
        ).value
        for student in (exact_student(gaussian, schedule), gaussian.velocity)
    )
    assert (exact < 1e-3 * denoiser).all()


def test_nonfinite_samples_are_masked_and_counted(
    schedule: VPSchedule, data: tuple[Tensor, Tensor]
) -> None:
    student, (x0, noise) = SmoothNetwork(5).double(), data

    def gradients_of(samples: list[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = lcm_loss(
            student,
            x0[samples],
            noise[samples],
            TIMESTEP[samples],
            TIMESTEP[samples] - 10,
            None,
            schedule=schedule,
            teacher=SmoothNetwork(5).double().requires_grad_(False),
        )
        gradients = torch.autograd.grad(loss.value.sum(), [*student.parameters()])
        return loss.diagnostics["nonfinite"], gradients

    x0[2, 3] = torch.nan
    torch.manual_seed(1)
    count, gradients = gradients_of([0, 1, 2, 3, 4, 5])
    torch.manual_seed(1)
    _, expected = gradients_of([0, 1, 3, 4, 5])
    assert count.tolist() == [0, 0, 1, 0, 0, 0]
    for one, two in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, two)


def test_timesteps_are_neighbours_on_the_grid_of_ddim(generator: torch.Generator) -> None:
    timestep, following = lcm_timesteps(100_000, generator)
    assert timestep.unique().tolist() == list(range(19, 1000, 20))
    torch.testing.assert_close(following, (timestep - 20).clamp(min=0))
    assert abs(timestep.double().mean() - 509) < 3


def test_sampling_equals_diffusers_lcm_scheduler(generator: torch.Generator) -> None:
    """The scheduler starts from z instead of sin(t) z and has ᾱ in float32."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    scheduler = diffusers.LCMScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]
    schedule = VPSchedule(scheduler.alphas_cumprod)
    eps_network = SmoothNetwork(5).double()

    def net(x: Tensor, t: Tensor, condition: object, end: Tensor | None = None) -> Tensor:
        eps = eps_network(x, t)
        return f_from_prediction(eps, x, kind="eps", signal=torch.cos(t), noise=torch.sin(t))

    noise = torch.randn(6, 5, dtype=torch.float64)
    generator.manual_seed(3)
    x = noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            eps = eps_network(x, schedule.t(timestep.expand(6)))
            step = scheduler.step(eps, timestep, x, generator=generator)
            x = step.prev_sample

        generator.manual_seed(3)
        t = schedule.t(scheduler.timesteps)
        ours = consistency_sample(
            lcm_network(net, schedule), noise / torch.sin(t[0]), t, None, noise_source=generator
        )
    torch.testing.assert_close(ours, step.denoised, atol=1e-5, rtol=1e-5)


def test_invalid_arguments_raise(schedule: VPSchedule, data: tuple[Tensor, Tensor]) -> None:
    net, generator = SmoothNetwork(5).double(), torch.Generator()

    def loss(timestep: Tensor, following: Tensor, huber_c: float = 1e-3) -> None:
        lcm_loss(
            net,
            *data,
            timestep,
            following,
            None,
            schedule=schedule,
            teacher=net,
            huber_c=huber_c,
        )

    with pytest.raises(ValueError, match=r"timestep has dtype torch.float32; .* are integers"):
        loss(TIMESTEP.float(), TIMESTEP - 1)
    with pytest.raises(ValueError, match="must be below timestep"):
        loss(TIMESTEP, TIMESTEP)
    with pytest.raises(ValueError, match="next_timestep has shape"):
        loss(TIMESTEP, TIMESTEP[:1] - 1)
    with pytest.raises(ValueError, match="one time per sample"):
        loss(TIMESTEP[:1], TIMESTEP[:1] - 1)
    with pytest.raises(ValueError, match="timestep lies in"):
        loss(TIMESTEP + 1, TIMESTEP)
    with pytest.raises(ValueError, match="huber_c is 0"):
        loss(TIMESTEP, TIMESTEP - 1, huber_c=0)
    t = schedule.t(TIMESTEP)
    with pytest.raises(ValueError, match="takes no end"):
        lcm_network(net, schedule)(data[0], t, None, end=t)
    with pytest.raises(ValueError, match=r"skip is 1001; it must be an integer in 2\.\.1000"):
        lcm_timesteps(4, generator, skip=1001)
