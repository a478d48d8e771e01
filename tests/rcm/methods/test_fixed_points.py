"""The exact consistency function, or flow map, of Gaussian data is a fixed point of every method.

Student, teacher and critic have closed forms, in float64. The gradient of each loss with respect to
the weights of smooth perturbations of the student is then zero:

    given x     for each sample, if the method takes the velocity from a teacher
    expected    on average over the data and noise that lead to x, if it takes it from them
    to order p  up to the error of one step of the teacher's solver, if it is discrete

A wrong map has a gradient in all cases.

Given x, Gaussian data are symmetric about their mean. For other data, a normalised tangent or a
weighted error of data and noise has an expected gradient at the exact map.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rcm.guidance import Guidance
from rcm.losses.lcm import lcm_network
from rcm.methods.lcm import SCHEDULE
from rcm.presets.methods import METHODS
from rcm.training.method import Distillation
from rcm.trigflow import Network
from tests.rcm.analytic_networks import Gaussian
from tests.rcm.methods.given_step import GivenStep, Perturbed, antithetic

Settings = dict[str, Any]
RANDOM_SCALES = Guidance(max_scale=8.0)

GIVEN_X: dict[str, list[Settings]] = {
    "scm": [{}, {"form": "rcm", "tangent_norm": "l2"}],
    "rcm": [{"rollout_steps": 1}, {"rollout_steps": 4}],
    "rcm-staged": [{"rollout_steps": 1}],
    "dmd": [{"rollout_steps": 1}],
    # A share of the tangent below 1 leaves a share of flow matching.
    "ayf": [
        {"objective": objective, "tangent_limit": 1.0}
        for objective in ("emd", "lmd", "unstopped-lmd")
    ],
    "meanflow": [{}, {"norm": "l2", "power": 1.0}],
    "imeanflow": [{"velocity": "teacher"}, {"velocity": "teacher", "guidance": RANDOM_SCALES}],
}
EXPECTED: dict[str, list[Settings]] = {
    "sct": [{}, {"tangent_norm": "l2"}],
    "meanflow": [{"velocity": "data"}, {"velocity": "data", "norm": "l2", "power": 1.0}],
    "imeanflow": [{}, {"guidance": RANDOM_SCALES}],
    "tvm": [{}],
}
# Settings, those of long steps, those of steps half as long, and the order of the solver.
TO_ORDER: dict[str, list[tuple[Settings, Settings, Settings, int]]] = {
    "dcm": [
        ({"solver": solver} | settings, {"teacher_steps": 200}, {"teacher_steps": 400}, order)
        for solver, order, settings in (
            ("euler", 1, {}),
            ("ddim", 1, {}),
            ("heun", 2, {}),
            ("euler", 1, {"skip": 3, "target_decay": 0.9}),
        )
    ],
    "rcm-staged": [({}, {"teacher_steps": 200}, {"teacher_steps": 400}, 2)],
    # Errors below huber_c have a gradient in proportion.
    "lcm": [({"huber_c": 1.0}, {"skip": 10}, {"skip": 5}, 1)],
}
ALL = {
    name: GIVEN_X.get(name, []) + EXPECTED.get(name, []) + [c[0] for c in TO_ORDER.get(name, [])]
    for name in GIVEN_X | EXPECTED | TO_ORDER
}

DATA, OTHER = Gaussian(), Gaussian(mean=0.2, std=0.8)
# Student, and the distribution of its samples in one step. As a consistency function the velocity
# is a denoiser, whose samples in one step are the mean of the data.
WRONG_MAPS: dict[str, tuple[Network, Gaussian]] = {
    "velocity": (DATA.velocity, Gaussian(DATA.mean, std=0.0)),
    "map of other data": (OTHER.flow_map_network, OTHER),
}


def cases(table: dict[str, list[Any]]) -> Any:
    """Parameters (name, case) of a test: every case of every method."""
    return pytest.mark.parametrize(
        ("name", "case"),
        [
            pytest.param(name, case, id=f"{name}-{number}")
            for name, listed in table.items()
            for number, case in enumerate(listed)
        ],
    )


def exact_student(name: str, data: Gaussian) -> Network:
    """The student of a method whose map is exact for the data."""
    if name != "lcm":
        return data.flow_map_network

    def student(x: Tensor, t: Tensor, condition: object = None, end: object = None) -> Tensor:
        """LCM's f is affine in F and leads to timestep 0, where it is x whatever F is."""
        point = data.ode_point(x, t, SCHEDULE.times[0].expand(len(t)))
        wanted = (torch.cos(t)[:, None] * x - point) / torch.sin(t)[:, None]
        at_zero = lcm_network(lambda x, t, c: torch.zeros_like(x), SCHEDULE)(x, t, None)
        at_one = lcm_network(lambda x, t, c: torch.ones_like(x), SCHEDULE)(x, t, None)
        slope = at_one - at_zero
        return torch.where(slope == 0, 0.0, (wanted - at_zero) / slope)

    return student


def gradients(
    method: Distillation,
    student: Network,
    samples: Gaussian = DATA,
    *,
    constant: float = 0.0,
    teacher: Network = DATA.velocity,
    expected: bool = False,
    iteration: int = -1,
    batch: int = 24,
) -> dict[str, Tensor]:
    """Gradients of the losses of `student + constant`, by name, in an iteration: the last one.

    samples: the distribution of the student's samples, whose velocity is the critic's. expected:
    average over data and noise that lead to the same x. Each sample, or each set of those, has a
    weight of its own, so that the gradient of the sum is zero only if the gradient of each is.
    """
    generator = torch.Generator().manual_seed(1)
    unit, noise = torch.randn(2, batch, 5, generator=generator, dtype=torch.float64)
    weights = 0.5 + torch.rand(batch, generator=generator, dtype=torch.float64)
    x0 = DATA.mean + DATA.std * unit
    t = torch.linspace(0.02, torch.pi / 2, batch, dtype=torch.float64)
    end = t * torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64).repeat(batch // 4)
    if expected:
        x0, noise = antithetic(x0, noise, t, DATA)
        t, end, weights = t.repeat(2), end.repeat(2), weights.repeat(2)
    trained = Perturbed(student, constant)
    networks = {
        "student": trained,
        "target": trained,
        "teacher": teacher,
        "critic": samples.velocity,
    }
    step = GivenStep(networks, x0, (noise,), t, end, iteration=iteration % method.iterations)
    found = {}
    for name, term in dict(method.losses(step))["student"].items():
        masked = [v for key, v in term.diagnostics.items() if key.endswith("nonfinite")]
        assert not torch.stack(masked).any()
        (found[name],) = torch.autograd.grad((weights * term.value).mean(), trained.weights)
    return found


def norms(gradients: dict[str, Tensor]) -> list[float]:
    return [gradient.norm().item() for gradient in gradients.values()]


def test_every_method_has_a_case() -> None:
    assert ALL.keys() == METHODS.keys()


@cases(GIVEN_X)
def test_the_exact_map_has_no_gradient(name: str, case: Settings) -> None:
    found = gradients(replace(METHODS[name], **case), exact_student(name, DATA))
    assert max(norms(found)) < 1e-10


@cases(EXPECTED)
def test_the_exact_map_has_no_expected_gradient(name: str, case: Settings) -> None:
    method, student = replace(METHODS[name], **case), exact_student(name, DATA)
    assert max(norms(gradients(method, student, expected=True))) < 1e-10
    assert min(norms(gradients(method, student))) > 1e-2


@cases(TO_ORDER)
def test_the_gradient_of_the_exact_map_vanishes_with_the_solvers_error(
    name: str, case: tuple[Settings, Settings, Settings, int]
) -> None:
    """One step of a solver of order p has an error of order p + 1. Discrete stages come first."""
    settings, long, short, order = case
    student = exact_student(name, DATA)
    coarse, fine = (
        norms(
            gradients(replace(METHODS[name], **settings | steps), student, iteration=0, batch=2000)
        )
        for steps in (long, short)
    )
    assert fine[0] < 1e-4
    assert coarse[0] / fine[0] == pytest.approx(2 ** (order + 1), rel=0.1)


@pytest.mark.parametrize("wrong", WRONG_MAPS)
@cases(ALL)
def test_a_wrong_map_has_a_gradient(name: str, case: Settings, wrong: str) -> None:
    method = replace(METHODS[name], **case)
    found = gradients(method, *WRONG_MAPS[wrong], expected=case in EXPECTED.get(name, []))
    assert min(norms(found)) > 1e-3


@pytest.mark.parametrize("constant", [-0.1, 0.1])
@cases(ALL)
def test_a_constant_added_to_the_exact_map_is_taken_back(
    name: str, case: Settings, constant: float
) -> None:
    """It moves samples in one step, from pure noise, by -constant."""
    method = replace(METHODS[name], **case)
    student, samples = exact_student(name, DATA), Gaussian(DATA.mean - constant, DATA.std)
    expected = case in EXPECTED.get(name, [])
    found = gradients(method, student, samples, constant=constant, expected=expected)
    for gradient in found.values():
        assert gradient[0] * constant > 0


@cases({name: GIVEN_X[name][:1] for name in GIVEN_X if name != "imeanflow"})
def test_the_exact_map_of_the_guided_teacher_has_no_gradient(name: str, case: Settings) -> None:
    """Velocities of one std are affine in the mean, so guidance moves the mean of the data."""
    method, scale, null_mean = METHODS[name], 2.0, -0.2
    guided_data = Gaussian(null_mean + scale * (DATA.mean - null_mean), DATA.std)

    def teacher(x: Tensor, t: Tensor, label: Tensor, end: Tensor | None = None) -> Tensor:
        means = torch.tensor([DATA.mean, null_mean], dtype=torch.float64)
        return Gaussian(means[label][:, None], DATA.std).velocity(x, t)  # type: ignore[arg-type]

    student = exact_student(name, guided_data)
    for guidance in (Guidance(scale=scale), Guidance()):
        method = replace(METHODS[name], **case | {"guidance": guidance})
        found = gradients(method, student, guided_data, teacher=teacher)
        if guidance.active:
            assert max(norms(found)) < 1e-10
        else:
            assert min(norms(found)) > 1e-2


@cases({name: [{}] for name in METHODS if "critic" in METHODS[name].roles()})
def test_the_velocity_of_the_students_samples_has_no_expected_gradient_as_a_critic(
    name: str, case: Settings
) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 24, 5, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.02, torch.pi / 2, 24, dtype=torch.float64)
    generated, noise = antithetic(OTHER.mean + OTHER.std * noise[0], noise[1], t, OTHER)
    first_noise = (generated - OTHER.mean) / OTHER.std
    found = []
    for critic in (Perturbed(OTHER.velocity), Perturbed(DATA.velocity)):
        networks = {"student": OTHER.flow_map_network, "critic": critic}
        data, times = torch.zeros_like(generated), t.repeat(2)
        step = GivenStep(networks, data, (first_noise, noise), times, times, iteration=0)
        loss = replace(METHODS[name], rollout_steps=1).critic(step)
        found += torch.autograd.grad(loss.value.mean(), critic.weights)
    assert found[0].norm() < 1e-10
    assert found[1].norm() > 1e-2
