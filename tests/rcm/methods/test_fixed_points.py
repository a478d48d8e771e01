"""The exact consistency function, or flow map, of Gaussian data is a fixed point of every method.

Student, teacher and critic have closed forms, in float64. The gradient of each loss with respect to
the weights of smooth perturbations of the student is then zero:

    given x     for each sample, if the method takes the velocity from a teacher
    expected    on average over the data and noise that lead to x, if it takes it from them
    to order p  up to the error of a step of the teacher's solver, if it is discrete

A wrong map has a gradient in all cases.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rcm.presets.digits import METHODS
from rcm.training.method import Distillation
from rcm.trigflow import Network
from tests.rcm.analytic_networks import Gaussian
from tests.rcm.methods.given_step import GivenStep, Perturbed, antithetic

GAUSSIAN = Gaussian()
BATCH, ELEMENTS = 24, 5

# How each method sees the ODE, and settings without which the exact map is no fixed point.
GIVEN_X: dict[str, list[dict[str, Any]]] = {
    "scm": [{}, {"form": "rcm", "tangent_norm": "l2"}],
    "rcm": [{"rollout_steps": 1}, {"rollout_steps": 4}],
    "dmd": [{"rollout_steps": 1}],
    # Less than the whole tangent leaves a share of flow matching.
    "ayf": [
        {"objective": objective, "tangent_limit": 1.0} for objective in ("emd", "lmd", "unstopped-lmd")
    ],
}
EXPECTED: dict[str, list[dict[str, Any]]] = {
    "sct": [{}, {"tangent_norm": "l2"}],
}
TO_ORDER: dict[str, list[tuple[dict[str, Any], int]]] = {
    "dcm": [
        ({"solver": "euler"}, 1),
        ({"solver": "ddim"}, 1),
        ({"solver": "heun"}, 2),
        ({"solver": "euler", "skip": 3, "target_decay": 0.9}, 1),
    ],
}


OTHER = Gaussian(mean=0.2, std=0.8)
WRONG_MAPS: dict[str, tuple[Network, Gaussian]] = {
    # with the distribution of its samples; as a consistency function the velocity is a denoiser,
    # whose samples in one step are the mean of the data
    "velocity": (GAUSSIAN.velocity, Gaussian(GAUSSIAN.mean, 0.0)),
    "map of other data": (OTHER.flow_map_network, OTHER),
}
TIMES = torch.linspace(0.02, torch.pi / 2, BATCH, dtype=torch.float64)
ENDS = TIMES * torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64).repeat(BATCH // 4)


def cases(table: dict[str, list[Any]]) -> Any:
    """Parameters (name, case) of a test, for every case of every method."""
    return pytest.mark.parametrize(
        ("name", "case"),
        [
            pytest.param(name, case, id=f"{name}-{number}")
            for name, listed in table.items()
            for number, case in enumerate(listed)
        ],
    )


def gradients(
    method: Distillation,
    student: Network,
    samples: Gaussian,
    *,
    expected_at: Tensor | None = None,
) -> dict[str, float]:
    """Norms of the gradients of the student's losses at the end of a run, by their names.

    samples: the distribution of the student's samples, whose velocity is the critic's. Every sample
    has a weight of its own, so that the gradient is zero only if each sample's is. With
    expected_at, pairs of samples with the same x at these times have the same weight.
    """
    trained, t, end = Perturbed(student), TIMES, ENDS
    generator = torch.Generator().manual_seed(1)
    unit, noise = torch.randn(2, BATCH, ELEMENTS, generator=generator, dtype=torch.float64)
    x0 = GAUSSIAN.mean + GAUSSIAN.std * unit
    weights = 0.5 + torch.rand(BATCH, generator=generator, dtype=torch.float64)
    if expected_at is not None:
        x0, noise = antithetic(x0, noise, expected_at, GAUSSIAN)
        t, end, weights = t.repeat(2), end.repeat(2), weights.repeat(2)
    step = GivenStep(
        {
            "student": trained,
            "target": trained,
            "teacher": GAUSSIAN.velocity,
            "critic": samples.velocity,
        },
        x0,
        (noise,),
        t,
        end,
        iteration=method.iterations - 1,
    )
    terms = dict(method.losses(step))["student"]
    assert not any(
        values.any()
        for term in terms.values()
        for name, values in term.diagnostics.items()
        if name.endswith("nonfinite")
    )
    return {
        name: torch.autograd.grad((weights * term.value).mean(), trained.weights)[0].norm().item()
        for name, term in terms.items()
    }


def test_every_method_has_a_fixed_point() -> None:
    tested = [*GIVEN_X, *EXPECTED, *TO_ORDER]
    assert sorted(tested) == sorted(METHODS)


@cases(GIVEN_X)
def test_the_exact_map_has_no_gradient_given_x(name: str, case: dict[str, Any]) -> None:
    method = replace(METHODS[name](), **case)
    for gradient in gradients(method, GAUSSIAN.flow_map_network, GAUSSIAN).values():
        assert gradient < 1e-10


@cases(EXPECTED)
def test_the_exact_map_has_no_expected_gradient(name: str, case: dict[str, Any]) -> None:
    method = replace(METHODS[name](), **case)
    exact = GAUSSIAN.flow_map_network
    for gradient in gradients(method, exact, GAUSSIAN, expected_at=TIMES).values():
        assert gradient < 1e-10
    for gradient in gradients(method, exact, GAUSSIAN).values():
        assert gradient > 1e-2


@cases(TO_ORDER)
def test_the_gradient_of_the_exact_map_vanishes_with_the_solvers_error(
    name: str, case: tuple[dict[str, Any], int]
) -> None:
    """One step of a solver of order p has an error of order p + 1."""
    settings, order = case
    coarse, fine = (
        sum(gradients(replace(METHODS[name](), **settings | steps), GAUSSIAN.flow_map_network, GAUSSIAN).values())
        for steps in ({"teacher_steps": 200}, {"teacher_steps": 400})
    )
    print(coarse, fine, coarse/fine)
    assert coarse / fine == pytest.approx(2 ** (order + 1), rel=0.1)


@pytest.mark.parametrize("wrong", WRONG_MAPS)
@cases({**GIVEN_X, **EXPECTED, **{n: [c[0] for c in l] for n, l in TO_ORDER.items()}})
def test_a_wrong_map_has_a_gradient(name: str, case: dict[str, Any], wrong: str) -> None:
    method = replace(METHODS[name](), **case)
    found = gradients(method, *WRONG_MAPS[wrong], expected_at=TIMES if name in EXPECTED else None)
    print(found)
    for gradient in found.values():
        assert gradient > 1e-2
