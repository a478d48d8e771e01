"""How a run scores samples: always from the same noise, against the real data.

Protocol: one sample for each real sample of the data that it is given, of its class, from noise
that is the same for every network, number of steps and run. The Fréchet distance, precision and
recall compare with these real samples, in the features of the data set's classifier or of another
network. The row "real" compares the two halves of the data: a baseline. Generated samples can be
closer than that, because there are twice as many of them.

Reports and probes of a training draw their noise from NOISE_SEED. The settings of the presets were
chosen by these samples, and whoever compares runs by their reports chooses by them.
`python -m rcm.evaluate` draws other noise, from EVALUATION_SEED.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from rcm.data.dataset import Classifier, Dataset, evenly_spaced, halves
from rcm.errors import RunError
from rcm.evaluation.manifold import Manifold, precision_and_recall
from rcm.evaluation.metrics import (
    frechet_distance,
    label_agreement,
    pairwise_diversity,
    same_noise_rmse,
)
from rcm.evaluation.progress import Counted, evaluations_shown
from rcm.sampling import heun_sample, heun_times
from rcm.training.method import Distillation
from rcm.trigflow import Network

NOISE_SEED = 20_251_008  # of reports and, plus 1 and 2, of later steps and probes
EVALUATION_SEED = 1_020_251_008  # above them, so that no --seed of rcm.evaluate repeats their noise
REFERENCE_STEPS = 32  # Heun steps after which the teacher's samples no longer change visibly
BATCH = 256  # samples that a network evaluates at once; they fit into the cache of a CPU
DIVERSITY_SAMPLES = 5000  # whose distances are computed: pairs of one class are many

Features = Callable[[Tensor], Tensor]
"""Samples (n, ...) -> features (n, dim)."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where samples come from: the real data, or a network and how it is sampled."""

    network: Literal["real", "teacher", "student"]
    steps: int | None = None
    """Heun steps of a teacher, evaluations of a student; None for real samples."""
    mid_times: tuple[float, ...] | None = None
    """Times of the student's steps 2, 3, ..., if its sampler has such times."""

    @property
    def evaluations(self) -> int | None:
        """Network evaluations for each sample."""
        if self.steps is None:
            return None
        return 2 * self.steps - 1 if self.network == "teacher" else self.steps

    def __str__(self) -> str:
        if self.steps is None:
            return self.network
        return f"{self.network}, {self.steps} step{'s' if self.steps > 1 else ''}"


REFERENCE = Source(network="teacher", steps=REFERENCE_STEPS)
"""The samples that others are compared with."""


def student_source(
    config: Distillation, steps: int, mid_times: tuple[float, ...] | None = None
) -> Source:
    """Samples of a student with these mid times, by default with those of its settings."""
    if mid_times is None:
        mid_times = getattr(config, "mid_times", None)
    used = None if mid_times is None else tuple(mid_times[: steps - 1])
    return Source(network="student", steps=steps, mid_times=used)


@dataclass(frozen=True)
class Scores:
    """The metrics of rcm.evaluation for one set of samples; None is what real data do not have."""

    frechet_distance: float
    label_agreement: float
    same_noise_rmse: float | None
    diversity: float
    diversity_ratio: float | None
    """The diversity divided by that of the teacher's samples; None if that is 0."""
    precision: float
    recall: float

    def __str__(self) -> str:
        rmse = "" if self.same_noise_rmse is None else f", RMSE {self.same_noise_rmse:.3f}"
        return (
            f"FD {self.frechet_distance:.2f}, label agreement {self.label_agreement:.3f}{rmse}, "
            f"diversity {self.diversity:.3f}, recall {self.recall:.3f}"
        )

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


@dataclass(frozen=True)
class Row:
    """A row of a report."""

    source: Source
    scores: Scores

    def as_dict(self) -> dict[str, Any]:
        """As evaluation.json has it."""
        source = self.source
        return {
            "network": source.network,
            "steps": source.steps,
            "evaluations": source.evaluations,
            "mid_times": None if source.mid_times is None else list(source.mid_times),
            **self.scores.as_dict(),
        }


@dataclass(frozen=True)
class Reference:
    """The teacher's samples (n, ...) with 32 steps, which others are compared with."""

    samples: Tensor
    diversity: float


class Evaluator:
    """Draws and scores samples of teachers and students, on the device of the data."""

    def __init__(
        self,
        data: Dataset,
        classifier: Classifier,
        config: Distillation,
        *,
        features: Features | None = None,
        noise_seed: int = NOISE_SEED,
    ) -> None:
        """features: by default those of the classifier."""
        self.data, self.classifier, self.config = data, classifier, config
        self.features = features or classifier.features
        self.noise_seed = noise_seed
        # Drawn on the CPU, so that every device samples from the same noise.
        noise = torch.randn(data.samples.shape, generator=Generator().manual_seed(noise_seed))
        self.noise = noise.to(data.samples)

    @cached_property
    def real_features(self) -> Tensor:
        """(n, dim)."""
        return self._batches(self.features, self.data.samples)

    @cached_property
    def real_manifold(self) -> Manifold:
        """The manifold of all real samples."""
        return Manifold(self.real_features)

    def progress(
        self, title: str, sources: Sequence[Source], *, shown: bool
    ) -> AbstractContextManager[Counted]:
        """A progress bar for drawing samples; see `evaluations_shown`."""
        evaluations = sum(source.evaluations or 0 for source in sources)
        return evaluations_shown(title, evaluations * len(self.data.labels), shown=shown)

    def reference(self, teacher: Network) -> Reference:
        """The teacher's samples with 32 steps."""
        return self.as_reference(self.teacher_samples(teacher, REFERENCE))

    def as_reference(self, samples: Tensor) -> Reference:
        """Samples (n, ...) of the teacher with 32 steps that were drawn before."""
        return Reference(samples, _diversity(samples, self.data.labels))

    def teacher_samples(self, teacher: Network, source: Source) -> Tensor:
        """Samples (n, ...) by Heun's method."""
        assert source.steps is not None
        times = heun_times(source.steps, sigma_max=self.config.sigma_max)
        return self._batches(
            lambda noise, labels: heun_sample(teacher, noise, times, labels),
            self.noise,
            self.data.labels,
        )

    def student_samples(self, student: Network, source: Source) -> Tensor:
        """Samples (n, ...) by the few-step sampler of the method."""
        config, steps = self.config, source.steps
        assert steps is not None
        if source != student_source(config, steps) and source.mid_times is not None:
            config = config.with_mid_times(source.mid_times)
        noise_source = Generator().manual_seed(self.noise_seed + 1)
        return self._batches(
            lambda noise, labels: sample_student(
                student, noise, labels, steps, config, noise_source
            ),
            self.noise,
            self.data.labels,
        )

    def row(self, source: Source, samples: Tensor, reference: Reference) -> Row:
        """Score samples of the data's labels; the reference is from the same noise.

        Raises RunError if the samples or their features are not finite.
        """
        with _scorable(f"samples of {source} cannot be scored", ": the training diverged"):
            return Row(source, self._scores(samples, reference))

    def teacher_row(self, teacher: Network, source: Source, reference: Reference) -> Row:
        """Draw and score samples of the teacher; those of the reference are drawn already."""
        known = source == REFERENCE
        samples = reference.samples if known else self.teacher_samples(teacher, source)
        return self.row(source, samples, reference)

    def real_row(self) -> Row:
        """The two halves of the data against each other; agreement on the held-out half.

        Raises RunError if the features are not finite.
        """
        with _scorable("the real samples cannot be scored"):
            return Row(Source(network="real"), self._real_scores())

    def _scores(self, samples: Tensor, reference: Reference) -> Scores:
        features = self._batches(self.features, samples)
        distance = frechet_distance(features, self.real_features)
        precision, recall = precision_and_recall(features, self.real_manifold, self.real_features)
        diversity = _diversity(samples, self.data.labels)
        return Scores(
            distance,
            label_agreement(self._batches(self.classifier.logits, samples), self.data.labels),
            same_noise_rmse(samples, reference.samples),
            diversity,
            diversity / reference.diversity if reference.diversity else None,
            precision,
            recall,
        )

    def _real_scores(self) -> Scores:
        trained, held_out = halves(len(self.data.labels))
        samples, labels = self.data.samples[held_out], self.data.labels[held_out]
        first, second = self.real_features[trained], self.real_features[held_out]
        precision, recall = precision_and_recall(second, Manifold(first), first)
        return Scores(
            frechet_distance(first, second),
            label_agreement(self._batches(self.classifier.logits, samples), labels),
            None,
            _diversity(samples, labels),
            None,
            precision,
            recall,
        )

    def first_of_each_class(self, count: int = 8, classes: int = 20) -> Tensor:
        """Indices of the first samples of each class: (classes, count).

        Of many classes, evenly spaced ones. count is smaller if a class has fewer samples.
        """
        labels = self.data.labels
        present = labels.unique()
        shown = min(classes, len(present))
        chosen = [
            (labels == c).nonzero()[:count, 0]
            for c in present[torch.arange(shown) * len(present) // shown]
        ]
        return torch.stack([indices[: min(map(len, chosen))] for indices in chosen])

    def _batches(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """function(*tensors), a batch of tensors (n, ...) at a time."""
        batches = zip(*(x.split(BATCH) for x in tensors), strict=True)
        with torch.no_grad():
            return torch.cat([function(*batch) for batch in batches])


@contextmanager
def _scorable(problem: str, reason: str = "") -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise RunError(f"{problem} ({error}){reason}") from error


@torch.no_grad()
def sample_student(
    student: Network,
    noise: Tensor,
    labels: Tensor,
    steps: int,
    config: Distillation,
    noise_source: Generator | None = None,
) -> Tensor:
    """Samples from noise (n, ...) and labels (n,).

    noise_source draws the noise of later steps; by default it is that of a report.
    """
    noise_source = noise_source or Generator().manual_seed(NOISE_SEED + 1)
    return config.sample(student, noise, labels, steps, noise_source)


def _diversity(samples: Tensor, labels: Tensor) -> float:
    chosen = evenly_spaced(DIVERSITY_SAMPLES, len(labels)).to(labels.device)
    return pairwise_diversity(samples[chosen], labels[chosen])
