"""Losses, their gradients and everything they are made of agree with rCM's published code."""

import pytest
import torch
from torch import Tensor

from rcm.losses import consistency_loss, flow_matching_loss, score_loss
from rcm.losses.consistency import Tangent, consistency_tangent, normalize_tangent
from rcm.losses.discrete_consistency import discrete_consistency_loss, discrete_times
from rcm.losses.loss import Loss
from rcm.ode import ode_step
from rcm.sampling import consistency_sample
from rcm.trigflow import Network, denoise, denoised, interpolate
from tests.rcm.oracle.stand_in import (
    CONDITION,
    ORACLE,
    UNCONDITION,
    StandIn,
    assert_recorded,
    trigflow,
    with_guidance,
)

SCALE = 100  # of their consistency losses, continuous and discrete
TEACHER = trigflow(StandIn("teacher").requires_grad_(False))


# ---- consistency loss --------------------------------------------------------------------------

SCM_T = ORACLE["scm_t"][:, 0]


def scm_tangent(warmup: float, dtype: torch.dtype = torch.float64) -> Tangent:
    return consistency_tangent(
        trigflow(StandIn("student").to(dtype)),
        ORACLE["scm_xt"].to(dtype),
        SCM_T,
        ORACLE["scm_F_teacher"].to(dtype),
        CONDITION.to(dtype),
        warmup=warmup,
        form="rcm",
    )


def scm_loss(student: StandIn, teacher: Network, warmup: float, dtype: torch.dtype) -> Loss:
    return consistency_loss(
        trigflow(student),
        ORACLE["x0"].to(dtype),
        ORACLE["scm_noise"].to(dtype),
        SCM_T,
        CONDITION.to(dtype),
        teacher=teacher,
        warmup=warmup,
        form="rcm",
        tangent_norm="l2",
    )


def test_predictions_of_student_and_guided_teacher() -> None:
    x = interpolate(ORACLE["x0"], ORACLE["scm_noise"], SCM_T)
    assert_recorded("scm_xt", x)
    assert_recorded("scm_F_teacher_cond", TEACHER(x, SCM_T, CONDITION))
    assert_recorded("scm_F_teacher_uncond", TEACHER(x, SCM_T, UNCONDITION))
    f_teacher = with_guidance(TEACHER)(x, SCM_T, CONDITION)
    assert_recorded("scm_F_teacher", f_teacher)
    assert_recorded("scm_x0_teacher", denoised(x, f_teacher, SCM_T))
    assert_recorded("scm_x0_student", denoise(trigflow(StandIn("student")), x, SCM_T, CONDITION))


def test_network_receives_the_same_input_and_direction() -> None:
    seen: list[Tensor] = []

    def probe(x: Tensor, time: Tensor, condition: object) -> Tensor:
        for argument in (x, time):
            seen.extend(torch.autograd.forward_ad.unpack_dual(argument))
        return x

    consistency_tangent(
        trigflow(probe), ORACLE["scm_xt"], SCM_T, ORACLE["scm_F_teacher"], CONDITION
    )
    names = ("scm_net_x", "scm_net_dx", "scm_net_timesteps", "scm_net_dtimesteps")
    for name, value in zip(names, seen, strict=True):
        assert_recorded(name, value)


@pytest.mark.parametrize("warmup", ["r0", "r03", "r1"])
def test_consistency_loss_and_its_gradient(warmup: str) -> None:
    r = ORACLE[f"scm_{warmup}_warmup"].item()
    tangent = scm_tangent(r)
    assert_recorded("scm_F", tangent.f)
    assert_recorded("scm_D", tangent.jvp)
    assert_recorded(f"scm_{warmup}_g", tangent.g)
    unit = normalize_tangent(tangent.g, norm="l2", eps=0.1)
    assert_recorded(f"scm_{warmup}_g_hat", unit)

    student = StandIn("student")
    loss = SCALE * scm_loss(student, with_guidance(TEACHER), r, torch.float64)
    assert_recorded(f"scm_{warmup}_loss_unscaled", loss.value / SCALE)
    assert_recorded(f"scm_{warmup}_loss", loss.value)
    assert_recorded(f"scm_{warmup}_grad_student", student.gradient(loss.value))


def test_consistency_loss_without_guidance() -> None:
    assert torch.equal(ORACLE["scm_noguide_F_teacher"], ORACLE["scm_F_teacher_cond"])
    loss = scm_loss(StandIn("student"), TEACHER, 1.0, torch.float64)
    assert_recorded("scm_noguide_loss", SCALE * loss.value)


def test_consistency_loss_of_a_float32_network() -> None:
    """Their code converts F back and forth through x̂0, so only rounding errors differ."""
    student = StandIn("student").float()
    teacher = with_guidance(trigflow(StandIn("teacher").float().requires_grad_(False)))
    loss = scm_loss(student, teacher, 1.0, torch.float32)
    assert_recorded("f32_scm_r1_loss", SCALE * loss.value, tolerance=1e-5)
    assert_recorded("f32_scm_r1_g", scm_tangent(1.0, torch.float32).g, tolerance=1e-5)


# ---- discrete consistency loss -----------------------------------------------------------------


@pytest.mark.parametrize("skip", [1, 3])
def test_discrete_times(
    skip: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **options: ORACLE["dcm_uniform"][:, 0])
    assert_recorded(f"dcm_k{skip}_t", discrete_times(4, generator, skip=skip))


@pytest.mark.parametrize("skip", [1, 3])
def test_discrete_consistency_loss_and_its_gradient(skip: int) -> None:
    times, teacher, student = (
        ORACLE[f"dcm_k{skip}_t"][..., 0],
        with_guidance(TEACHER),
        StandIn("student"),
    )
    x = interpolate(ORACLE["x0"], ORACLE["dcm_noise"], times[0])
    assert_recorded(f"dcm_k{skip}_xt", x)
    assert_recorded(f"dcm_k{skip}_F_teacher_first", teacher(x, times[0], CONDITION))
    assert_recorded(f"dcm_k{skip}_x0_pred", denoise(trigflow(student), x, times[0], CONDITION))
    for i in range(skip):
        x = ode_step(teacher, x, times[i], times[i + 1], CONDITION)
    assert_recorded(f"dcm_k{skip}_x_end", x)
    assert_recorded(f"dcm_k{skip}_x0_target", denoise(trigflow(student), x, times[-1], CONDITION))

    loss = SCALE * discrete_consistency_loss(
        trigflow(student), ORACLE["x0"], ORACLE["dcm_noise"], times, CONDITION, teacher=teacher
    )
    assert_recorded(f"dcm_k{skip}_loss_unscaled", loss.value / SCALE)
    assert_recorded(f"dcm_k{skip}_loss", loss.value)
    assert_recorded(f"dcm_k{skip}_grad_student", student.gradient(loss.value))


# ---- score loss and critic ---------------------------------------------------------------------

SCORE_T, SCORE_NOISE = ORACLE["dmd_t"][:, 0], ORACLE["d_noise"]


def rollout(student: StandIn, steps: int) -> Tensor:
    dtype = student.frequencies.dtype
    return consistency_sample(
        trigflow(student),
        ORACLE["rollout_noise"].to(dtype),
        ORACLE[f"rollout{steps}_t"][:-1],
        CONDITION.to(dtype),
        noise_source=list(ORACLE["rollout_fresh"].to(dtype)),
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_score_loss_and_its_gradients(steps: int) -> None:
    student, fake = StandIn("student"), trigflow(StandIn("fake"))
    teacher = with_guidance(TEACHER)
    sample = rollout(student, steps)
    x = interpolate(sample, SCORE_NOISE, SCORE_T)
    assert_recorded(f"dmd{steps}_sample", sample)
    assert_recorded(f"dmd{steps}_xt", x)
    assert_recorded(f"dmd{steps}_x0_fake", denoise(fake, x, SCORE_T, CONDITION))
    assert_recorded(f"dmd{steps}_x0_teacher", denoise(teacher, x, SCORE_T, CONDITION))

    loss = score_loss(sample, SCORE_NOISE, SCORE_T, CONDITION, teacher=teacher, fake_score=fake)
    (grad_sample,) = torch.autograd.grad(loss.value.sum(), sample, retain_graph=True)
    assert_recorded(f"dmd{steps}_weight", loss.diagnostics["dmd_scale"])
    assert_recorded(f"dmd{steps}_loss", loss.value)
    assert_recorded(f"dmd{steps}_direction", grad_sample / 2)
    assert_recorded(f"dmd{steps}_grad_sample", grad_sample)
    assert_recorded(f"dmd{steps}_grad_student", student.gradient(loss.value))


def test_score_loss_of_a_float32_network() -> None:
    fake, teacher = (
        trigflow(StandIn(role).float().requires_grad_(False)) for role in ("fake", "teacher")
    )
    sample = rollout(StandIn("student").float(), 4)
    assert_recorded("f32_dmd4_sample", sample, tolerance=1e-5)
    loss = score_loss(
        sample,
        SCORE_NOISE.float(),
        SCORE_T,
        CONDITION.float(),
        teacher=with_guidance(teacher),
        fake_score=fake,
    )
    assert_recorded("f32_dmd4_loss", loss.value, tolerance=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_flow_matching_loss_of_the_critic_and_its_gradient(steps: int) -> None:
    fake, sample = StandIn("fake"), rollout(StandIn("student"), steps).detach()
    assert_recorded(f"critic{steps}_sample", sample)
    x = interpolate(sample, SCORE_NOISE, SCORE_T)
    assert_recorded(f"critic{steps}_xt", x)
    assert_recorded(f"critic{steps}_x0_fake", denoise(trigflow(fake), x, SCORE_T, CONDITION))
    loss = flow_matching_loss(trigflow(fake), sample, SCORE_NOISE, SCORE_T, CONDITION, norm="l2")
    assert_recorded(f"critic{steps}_loss", loss.value)
    assert_recorded(f"critic{steps}_grad_fake", fake.gradient(loss.value))
