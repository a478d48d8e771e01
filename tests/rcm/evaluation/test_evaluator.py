"""The protocol of scores: exact networks, lost modes, noise, schedules and batches."""

import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from rcm.data.dataset import Dataset, evenly_spaced, halves
from rcm.errors import RunError
from rcm.evaluation import evaluator as module
from rcm.evaluation import progress
from rcm.evaluation.evaluator import (
    EVALUATION_SEED,
    NOISE_SEED,
    REFERENCE,
    Evaluator,
    Reference,
    Source,
    student_source,
)
from tests.rcm.analytic_networks import Gaussian
from tests.rcm.evaluation.samplers import SETTINGS, FirstElement, OneTime, TwoTimes

ONE_TIME = OneTime(**SETTINGS)


@pytest.fixture
def data(generator: Generator) -> Dataset:
    """200 samples of a Gaussian."""
    samples = 0.7 + 0.4 * torch.randn(200, 1, 2, 2, generator=generator, dtype=torch.float64)
    return Dataset(samples, torch.arange(200) // 3 % 2, classes=2)


def evaluator(data: Dataset, config: Any = ONE_TIME, **options: Any) -> Evaluator:
    return Evaluator(data, FirstElement(), config, **options)


def test_an_exact_student_scores_like_the_data(data: Dataset, gaussian: Gaussian) -> None:
    judge = evaluator(data)
    reference = judge.reference(gaussian.velocity)
    source = student_source(ONE_TIME, 1)
    samples = judge.student_samples(gaussian.consistency, source)
    scores = judge.row(source, samples, reference).scores
    real = judge.real_row().scores
    assert scores.frechet_distance < 0.05
    assert scores.same_noise_rmse == pytest.approx(0, abs=4e-3)  # of Heun's method with 32 steps
    assert scores.diversity_ratio == pytest.approx(1, abs=1e-2)
    assert scores.precision == pytest.approx(real.precision, abs=0.1)
    assert scores.recall == pytest.approx(real.recall, abs=0.1)
    assert real.same_noise_rmse is None
    assert real.diversity_ratio is None


def test_the_teacher_is_its_own_reference(data: Dataset, gaussian: Gaussian) -> None:
    judge = evaluator(data)
    reference = judge.reference(gaussian.velocity)
    same, blurry = (
        judge.teacher_row(gaussian.velocity, source, reference).scores
        for source in (REFERENCE, Source(network="teacher", steps=1))
    )
    assert same.same_noise_rmse == 0
    assert same.diversity_ratio == 1
    assert blurry.same_noise_rmse is not None
    assert blurry.same_noise_rmse > 0.1
    assert blurry.recall < 0.1  # one step gives the mean


def test_a_lost_mode_halves_the_recall_and_the_agreement(generator: Generator) -> None:
    labels = torch.arange(100) % 2
    samples = torch.randn(100, 1, 2, 2, generator=generator) + 20 * (labels * 2 - 1).view(
        -1, 1, 1, 1
    )
    judge = evaluator(Dataset(samples, labels, 2))
    first = samples[labels == 0].repeat_interleave(2, dim=0)
    scores = judge.row(REFERENCE, first, Reference(samples, 1.0)).scores
    assert scores.recall == 0.5
    assert scores.precision == 1
    assert scores.label_agreement == 0.5


def test_samples_that_are_not_finite_are_no_scores(data: Dataset, gaussian: Gaussian) -> None:
    judge = evaluator(data)
    reference = judge.reference(gaussian.velocity)
    with pytest.raises(RunError, match=r"student, 2 steps cannot be scored .*NaN.*diverged"):
        judge.row(student_source(ONE_TIME, 2), reference.samples * math.nan, reference)


def test_a_teacher_without_diversity_has_no_ratio(data: Dataset) -> None:
    judge = evaluator(data)
    row = judge.row(REFERENCE, data.samples, Reference(data.samples, 0.0))
    assert row.scores.diversity_ratio is None


def test_each_seed_has_its_own_noise(data: Dataset, gaussian: Gaussian) -> None:
    two = student_source(ONE_TIME, 2)
    seeds = (NOISE_SEED, EVALUATION_SEED, EVALUATION_SEED + 2)
    judges = [evaluator(data, noise_seed=seed) for seed in seeds]
    assert torch.equal(evaluator(data).noise, judges[0].noise)
    # With noise alone, a step multiplies by cos t: the samples show the noise of the later step.
    later = [judge.student_samples(lambda x, *rest: torch.zeros_like(x), two) for judge in judges]
    noises = [judge.noise for judge in judges] + later
    for i, noise in enumerate(noises):
        for other in noises[:i]:
            both = torch.stack([noise.flatten(), other.flatten()])
            assert torch.corrcoef(both)[0, 1].abs() < 0.15


class TimesOf:
    """A network that records its times."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        self.times.append(round(float(t[0]), 6))
        return torch.zeros_like(x)


@pytest.mark.parametrize("mid_times", [None, (0.9,), (1.3, 1.0, 0.6)])
def test_a_student_is_sampled_at_the_mid_times_of_its_source(
    data: Dataset, mid_times: tuple[float, ...] | None
) -> None:
    steps = 2 if mid_times is None else len(mid_times) + 1
    source = student_source(ONE_TIME, steps, mid_times)
    student = TimesOf()
    evaluator(data).student_samples(student, source)
    assert student.times == [round(math.atan(80), 6), *(mid_times or (1.5,))]
    assert source.mid_times == (mid_times or (1.5,))


def test_a_flow_map_has_no_mid_times(data: Dataset) -> None:
    config = TwoTimes(**SETTINGS)
    assert student_source(config, 4).mid_times is None
    with pytest.raises(ValueError, match="no mid times"):
        config.with_mid_times((1.1,))


@pytest.mark.parametrize(
    "source",
    [Source(network="teacher", steps=n) for n in (1, 2, 8)] + [student_source(ONE_TIME, 4)],
)
def test_evaluations_are_those_of_the_network(data: Dataset, source: Source) -> None:
    network, judge = TimesOf(), evaluator(data)
    draw = judge.teacher_samples if source.network == "teacher" else judge.student_samples
    draw(network, source)
    assert len(network.times) == source.evaluations


def test_batches_do_not_change_samples_and_scores(
    data: Dataset, gaussian: Gaussian, monkeypatch: pytest.MonkeyPatch
) -> None:
    def results() -> tuple[Tensor, Tensor, object]:
        judge, one = evaluator(data), student_source(ONE_TIME, 1)
        reference = judge.reference(gaussian.velocity)
        samples = judge.student_samples(gaussian.consistency, one)
        return reference.samples, samples, judge.row(one, samples, reference)

    whole = results()
    monkeypatch.setattr(module, "BATCH", 30)
    parts = results()
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])
    assert parts[2] == whole[2]
    noisy = evaluator(data).student_samples(TimesOf(), student_source(ONE_TIME, 2))
    assert not torch.equal(noisy[:30], noisy[30:60])  # each batch has its own later noise


def test_the_progress_ends_at_its_total(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar(progress.tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "disable": False, "delay": 1e9})
            bars.append(self)

    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(module, "BATCH", 30)
    judge = evaluator(data)
    sources = [REFERENCE, student_source(ONE_TIME, 4)]
    with judge.progress("scoring", sources, shown=True) as counted:
        judge.reference(counted(TimesOf()))
        judge.student_samples(counted(TimesOf()), sources[1])
    assert bars[0].n == bars[0].total == 200 * (63 + 4)


def test_features_are_those_of_any_callable(data: Dataset, gaussian: Gaussian) -> None:
    plain = evaluator(data).real_row().scores
    scaled = evaluator(data, features=lambda x: 3 * x.flatten(1)).real_row().scores
    assert scaled.frechet_distance == pytest.approx(9 * plain.frechet_distance)
    assert scaled.recall == plain.recall


def test_chosen_samples_keep_their_half() -> None:
    for total in (100, 101):
        chosen = evenly_spaced(40, total)
        assert len(set(chosen.tolist())) == 40
        assert chosen.max() >= total - 6
        for part, half in zip(halves(40), halves(total), strict=True):
            assert set(chosen[part].tolist()) <= set(half.tolist())
