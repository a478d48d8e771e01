"""How a run judges samples: always from the same noise, against the real digits.

Protocol: one sample for each of the 1797 digits, of that digit's class, from noise that is the same
for every network, step count and run. The Fréchet distance is to all 1797 digits, in the features
of `rcm.digits.DigitFeatures`. That of the data's two halves is printed beside it, for scale: it is
what chance alone makes of 900 digits; 1797 samples can come closer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Generator, Tensor

from rcm.config import StudentConfig
from rcm.digits import CLASSES, Digits, halves, train_features
from rcm.metrics import (
    frechet_distance,
    label_agreement,
    pairwise_diversity,
    same_noise_rmse,
)
from rcm.sampling import consistency_sample, consistency_times, heun_sample, heun_times
from rcm.trigflow import Network

NOISE_SEED = 20_251_008
REFERENCE_STEPS = 32  # Heun steps after which the teacher's samples no longer change visibly


@dataclass(frozen=True)
class Scores:
    """The metrics of rcm.metrics for one set of samples; the RMSE is None for real data."""

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


class Evaluation:
    """Samples and scores teachers and students of the digits."""

    def __init__(self, digits: Digits, config: StudentConfig) -> None:
        self.digits, self.config = digits, config
        self.features = train_features(digits)
        self.real_features = self.features(digits.images)
        self.noise = torch.randn(digits.images.shape, generator=Generator().manual_seed(NOISE_SEED))

    def teacher_samples(self, teacher: Network, steps: int) -> Tensor:
        """(1797, 1, 8, 8) by Heun's method."""
        times = heun_times(steps, sigma_max=self.config.sigma_max)
        return heun_sample(teacher, self.noise, times, self.digits.labels)

    @torch.no_grad()
    def student_samples(self, student: Network, steps: int) -> Tensor:
        """(1797, 1, 8, 8) by multi-step consistency sampling."""
        return sample_student(student, self.noise, self.digits.labels, steps, self.config)

    def scores(self, samples: Tensor, endpoints: Tensor | None) -> Scores:
        """Judge samples made for the digits' labels; endpoints are the teacher's, same noise."""
        return Scores(
            frechet_distance(self.features(samples), self.real_features),
            label_agreement(self.features.logits(samples), self.digits.labels),
            None if endpoints is None else same_noise_rmse(samples, endpoints),
            pairwise_diversity(samples, self.digits.labels),
        )

    def real_scores(self) -> Scores:
        """One half of the data against the other; agreement on the half the features never saw."""
        one, other = halves(len(self.digits.labels))
        images, labels = self.digits.images[other], self.digits.labels[other]
        return Scores(
            frechet_distance(self.real_features[one], self.real_features[other]),
            label_agreement(self.features.logits(images), labels),
            None,
            pairwise_diversity(images, labels),
        )

    def shown(self, images: Tensor, per_class: int = 8) -> Tensor:
        """The first few images of each class, class by class: (10 · per_class, 1, 8, 8)."""
        labels = self.digits.labels
        chosen = [(labels == c).nonzero()[:per_class, 0] for c in range(CLASSES)]
        return images[torch.cat(chosen)]


def sample_student(
    student: Network, noise: Tensor, labels: Tensor, steps: int, config: StudentConfig
) -> Tensor:
    """Samples (n, 1, 8, 8) from noise (n, 1, 8, 8) and labels (n,); re-noising has a fixed seed."""
    times = consistency_times(steps, sigma_max=config.sigma_max, mid_times=config.mid_times)
    fresh = Generator().manual_seed(NOISE_SEED + 1)
    return consistency_sample(student, noise, times, labels, fresh=fresh)
