"""How a run scores samples: always from the same noise, against the real data.

Protocol: one sample for each real sample of the data that it is given, of its class, from noise
that is the same for every network, number of steps and run. The Fréchet distance is to these real
samples, in the features of the data set's classifier. The distance between the two halves of the
data is the baseline. Generated samples can be closer than that, because there are twice as many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Generator, Tensor

from rcm.data.dataset import Classifier, Dataset, evenly_spaced, halves
from rcm.evaluation.metrics import (
    frechet_distance,
    label_agreement,
    pairwise_diversity,
    same_noise_rmse,
)
from rcm.sampling import heun_sample, heun_times
from rcm.training.method import Distillation
from rcm.trigflow import Network

NOISE_SEED = 20_251_008
CHUNK = 2048  # samples that are drawn at once, which bounds the memory
DIVERSITY_SAMPLES = 5000  # whose distances are computed: pairs of one class are many
REFERENCE_STEPS = 32  # Heun steps after which the teacher's samples no longer change visibly


@dataclass(frozen=True)
class Scores:
    """The metrics of rcm.evaluation.metrics for one set of samples; RMSE is None for real data."""

    frechet_distance: float
    label_agreement: float
    same_noise_rmse: float | None
    diversity: float

    def __str__(self) -> str:
        rmse = "" if self.same_noise_rmse is None else f", RMSE {self.same_noise_rmse:.3f}"
        return (
            f"FD {self.frechet_distance:.2f}, label agreement {self.label_agreement:.3f}{rmse}, "
            f"diversity {self.diversity:.3f}"
        )

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


class Evaluator:
    """Draws and scores samples of teachers and students, on the device of the data."""

    def __init__(self, data: Dataset, classifier: Classifier, config: Distillation) -> None:
        self.data, self.classifier, self.config = data, classifier, config
        self.real_features = _in_chunks(classifier.features, data.samples)
        # Drawn on the CPU, so that every device samples from the same noise.
        noise = torch.randn(data.samples.shape, generator=Generator().manual_seed(NOISE_SEED))
        self.noise = noise.to(data.samples)

    def teacher_samples(self, teacher: Network, steps: int) -> Tensor:
        """Samples (n, ...) by Heun's method."""
        times = heun_times(steps, sigma_max=self.config.sigma_max)

        def draw(noise: Tensor, labels: Tensor) -> Tensor:
            return heun_sample(teacher, noise, times, labels)

        return _in_chunks(draw, self.noise, self.data.labels)

    def student_samples(self, student: Network, steps: int) -> Tensor:
        """Samples (n, ...) by the few-step sampler of the method."""
        return sample_student(student, self.noise, self.data.labels, steps, self.config)

    def scores(self, samples: Tensor, teacher_samples: Tensor) -> Scores:
        """Score samples of the data's labels; the teacher's samples are from the same noise."""
        return Scores(
            frechet_distance(_in_chunks(self.classifier.features, samples), self.real_features),
            label_agreement(_in_chunks(self.classifier.logits, samples), self.data.labels),
            same_noise_rmse(samples, teacher_samples),
            _diversity(samples, self.data.labels),
        )

    def real_scores(self) -> Scores:
        """The two halves of the data against each other; agreement on the held-out half."""
        trained, held_out = halves(len(self.data.labels))
        samples, labels = self.data.samples[held_out], self.data.labels[held_out]
        return Scores(
            frechet_distance(self.real_features[trained], self.real_features[held_out]),
            label_agreement(_in_chunks(self.classifier.logits, samples), labels),
            None,
            _diversity(samples, labels),
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


@torch.no_grad()
def sample_student(
    student: Network, noise: Tensor, labels: Tensor, steps: int, config: Distillation
) -> Tensor:
    """Samples from noise (n, ...) and labels (n,); the noise of later steps has a fixed seed."""
    noise_source = Generator().manual_seed(NOISE_SEED + 1)

    def draw(noise: Tensor, labels: Tensor) -> Tensor:
        return config.sample(student, noise, labels, steps, noise_source)

    return _in_chunks(draw, noise, labels)


def _in_chunks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function of some rows of the tensors at a time: (n, ...)."""
    chunks = zip(*(tensor.split(CHUNK) for tensor in tensors), strict=True)
    return torch.cat([function(*chunk) for chunk in chunks])


def _diversity(samples: Tensor, labels: Tensor) -> float:
    chosen = evenly_spaced(DIVERSITY_SAMPLES, len(labels)).to(labels.device)
    return pairwise_diversity(samples[chosen], labels[chosen])
