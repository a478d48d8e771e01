"""How a run scores samples: always from the same noise, against the real data.

Protocol: one sample for each real sample, of its class, from noise that is the same for every
network, number of steps and run. The Fréchet distance is to all real samples, in the features of
the data set's classifier. The distance between the two halves of the data is the baseline.
Generated samples can be closer than that, because there are twice as many of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Generator, Tensor

from rcm.data.dataset import Classifier, Dataset, halves
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
        self.real_features = classifier.features(data.samples)
        # Drawn on the CPU, so that every device samples from the same noise.
        noise = torch.randn(data.samples.shape, generator=Generator().manual_seed(NOISE_SEED))
        self.noise = noise.to(data.samples)

    def teacher_samples(self, teacher: Network, steps: int) -> Tensor:
        """Samples (n, ...) by Heun's method."""
        times = heun_times(steps, sigma_max=self.config.sigma_max)
        return heun_sample(teacher, self.noise, times, self.data.labels)

    def student_samples(self, student: Network, steps: int) -> Tensor:
        """Samples (n, ...) by the few-step sampler of the method."""
        return sample_student(student, self.noise, self.data.labels, steps, self.config)

    def scores(self, samples: Tensor, teacher_samples: Tensor) -> Scores:
        """Score samples of the data's labels; the teacher's samples are from the same noise."""
        return Scores(
            frechet_distance(self.classifier.features(samples), self.real_features),
            label_agreement(self.classifier.logits(samples), self.data.labels),
            same_noise_rmse(samples, teacher_samples),
            pairwise_diversity(samples, self.data.labels),
        )

    def real_scores(self) -> Scores:
        """The two halves of the data against each other; agreement on the held-out half."""
        trained, held_out = halves(len(self.data.labels))
        samples, labels = self.data.samples[held_out], self.data.labels[held_out]
        return Scores(
            frechet_distance(self.real_features[trained], self.real_features[held_out]),
            label_agreement(self.classifier.logits(samples), labels),
            None,
            pairwise_diversity(samples, labels),
        )

    def first_of_each_class(self, samples: Tensor, count: int = 8) -> Tensor:
        """The first samples of each class, class by class: (classes · count, ...)."""
        labels = self.data.labels
        chosen = [(labels == c).nonzero()[:count, 0] for c in labels.unique()]
        return samples[torch.cat(chosen)]


@torch.no_grad()
def sample_student(
    student: Network, noise: Tensor, labels: Tensor, steps: int, config: Distillation
) -> Tensor:
    """Samples from noise (n, ...) and labels (n,); the noise of later steps has a fixed seed."""
    noise_source = Generator().manual_seed(NOISE_SEED + 1)
    return config.sample(student, noise, labels, steps, noise_source)
