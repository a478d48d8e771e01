"""Probes: a perfect student, a wrong one, and randomness that stays out of the training's."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from rcm.data.dataset import Dataset
from rcm.evaluation.probes import PROBES, Probes
from rcm.guidance import Guidance, GuidedCondition
from rcm.trigflow import Network
from tests.rcm.analytic_networks import Gaussian, SmoothNetwork
from tests.rcm.evaluation.samplers import SETTINGS, FirstElement, OneTime, TwoTimes


@pytest.fixture
def data(generator: Generator) -> Dataset:
    """100 samples of a Gaussian, sorted by label."""
    samples = 0.7 + 0.4 * torch.randn(100, 1, 2, 2, generator=generator, dtype=torch.float64)
    return Dataset(samples, (torch.arange(100) >= 50).long(), classes=2)


def probes(data: Dataset, teacher: Network, config: Any = None) -> Probes:
    return Probes(data, FirstElement(), config or OneTime(**SETTINGS), teacher)


def test_the_exact_consistency_function_agrees_with_the_teacher(
    data: Dataset, gaussian: Gaussian
) -> None:
    metrics = probes(data, gaussian.velocity).measure(gaussian.consistency)
    assert metrics["probe_rmse"] < 4e-3  # of Heun's method with 32 steps
    assert metrics["jvp_cosine"] == pytest.approx(1, abs=1e-6)


def test_the_exact_flow_map_is_called_with_its_end(data: Dataset, gaussian: Gaussian) -> None:
    ends: list[Tensor] = []

    def student(x: Tensor, t: Tensor, condition: object, *, end: Tensor) -> Tensor:
        ends.append(end)
        return gaussian.flow_map_network(x, t, end=end)

    metrics = probes(data, gaussian.velocity, TwoTimes(**SETTINGS)).measure(student)  # type: ignore[arg-type]
    assert metrics["probe_rmse"] < 4e-3
    assert metrics["jvp_cosine"] == pytest.approx(1, abs=1e-6)
    assert len(ends) > 2
    assert all(bool((end == 0).all()) for end in ends)


def test_the_teacher_as_a_student_has_the_error_of_one_step(
    data: Dataset, gaussian: Gaussian
) -> None:
    """One step gives the mean of the data, which has the distance std to its samples."""
    measured = probes(data, gaussian.velocity)
    assert measured.teacher_rmse() == pytest.approx(0.4, rel=0.15)
    student = measured.measure(gaussian.velocity)
    assert student["probe_rmse"] == pytest.approx(measured.teacher_rmse())


def test_agreement_is_with_the_labels(data: Dataset) -> None:
    """A velocity towards the sign of the label."""

    def student(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return (1 - 2 * labels.to(x)).view(-1, 1, 1, 1) + 0 * x

    measured = probes(data, student)  # type: ignore[arg-type]
    assert len(measured.labels) == PROBES
    assert measured.labels.double().mean() == 0.5
    assert measured.measure(student)["probe_agreement"] == 1  # type: ignore[arg-type]

    def opposite(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return student(x, t, 1 - labels)

    assert measured.measure(opposite)["probe_agreement"] == 0  # type: ignore[arg-type]


def test_the_cosine_shows_a_network_that_rounds_its_time(data: Dataset, gaussian: Gaussian) -> None:
    """Its JVP has no derivative by t, which a difference has."""

    def rounding(x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        return gaussian.consistency(x, torch.round(t * 1e5) / 1e5)

    measured = probes(data, gaussian.velocity)
    assert measured.measure(rounding)["jvp_cosine"] < 0.9  # type: ignore[arg-type]


def test_probes_are_the_same_in_every_run(data: Dataset, gaussian: Gaussian) -> None:
    first, second = (probes(data, gaussian.velocity) for _ in range(2))
    for name in ("noise", "labels", "x", "t", "teacher_samples"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@dataclass(frozen=True, kw_only=True)
class GuidanceAsInput(OneTime):
    def sample(
        self, student: Network, noise: Tensor, condition: Any, steps: int, noise_source: Generator
    ) -> Tensor:
        scale = torch.full((len(noise),), 3.0)
        condition = GuidedCondition(condition, scale, 0 * scale, 0 * scale + math.pi / 2)
        return super().sample(student, noise, condition, steps, noise_source)


@pytest.mark.parametrize(
    "config",
    [OneTime(**SETTINGS, guidance=Guidance(scale=3.0)), GuidanceAsInput(**SETTINGS)],
    ids=["of the teacher", "as an input"],
)
def test_probes_of_a_student_with_guidance_follow_the_guided_teacher(
    data: Dataset, config: OneTime
) -> None:
    def teacher(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        shift = torch.where(labels == data.classes, 0.0, 1.0).to(x)
        return -torch.sin(t).view(-1, 1, 1, 1) * shift.view(-1, 1, 1, 1) + 0 * x

    plain = probes(data, teacher)  # type: ignore[arg-type]
    guided = probes(data, teacher, config)  # type: ignore[arg-type]
    ratio = guided.teacher_samples.mean() / plain.teacher_samples.mean()
    assert ratio.item() == pytest.approx(3, rel=0.05)

    conditions: list[Any] = []

    def student(x: Tensor, t: Tensor, condition: Any) -> Tensor:
        conditions.append(condition)
        return 0 * x

    guided.measure(student)  # type: ignore[arg-type]
    kind = GuidedCondition if isinstance(config, GuidanceAsInput) else Tensor
    assert len(conditions) > 2
    assert all(isinstance(condition, kind) for condition in conditions)


def test_probing_leaves_random_numbers_and_gradients_alone(data: Dataset) -> None:
    student = SmoothNetwork(4, dropout=0.5).double()
    measured = probes(data, student)
    before = torch.get_rng_state()
    measured.measure(student)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None and p.requires_grad for p in student.parameters())


def test_a_small_data_set_is_probed_at_each_sample(gaussian: Gaussian) -> None:
    few = Dataset(torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), 2)
    measured = probes(few, gaussian.velocity)
    assert len(measured.noise) == 3
    assert math.isfinite(measured.measure(gaussian.velocity)["probe_rmse"])
