"""Probes: a cheap measurement of a student in training, on 64 fixed noises and conditions.

    probe_rmse       same-noise RMSE of its one-step samples to the teacher's 32-step samples
    probe_agreement  label agreement of its one-step samples
    jvp_cosine       cosine of dF/dt along the teacher's ODE with a central difference

They measure the network with its own weights, not with the averaged ones, which lag behind. Probes
are the same in all runs on a data set, and draw nothing from the random numbers of the training.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor

from rcm.data.dataset import Classifier, Dataset
from rcm.derivatives import restored_random_state
from rcm.evaluation.evaluator import NOISE_SEED, REFERENCE_STEPS, sample_student
from rcm.evaluation.metrics import label_agreement, same_noise_rmse
from rcm.guidance import GuidedCondition, guided
from rcm.losses.consistency import jvp_cosine
from rcm.sampling import heun_sample, heun_times
from rcm.training.method import Distillation
from rcm.trigflow import Network, interpolate, network_time

PROBES = 64


class Probes:
    """Measures students of one method and one teacher, on the device of the data."""

    def __init__(
        self, data: Dataset, classifier: Classifier, config: Distillation, teacher: Network
    ) -> None:
        count = min(PROBES, len(data.labels))
        # Evenly spaced, because a data set may be sorted by label.
        chosen = torch.arange(count) * len(data.labels) // count
        self.classifier, self.config = classifier, config
        x0, self.labels = data.samples[chosen], data.labels[chosen]
        # Drawn on the CPU, so that every device samples from the same noise.
        generator = Generator().manual_seed(NOISE_SEED + 2)
        self.noise = torch.randn(x0.shape, generator=generator).to(x0)
        self._record_call_of_sampler()
        self.teacher = self._guided(teacher, data, generator)
        self.teacher_samples = self._teacher_samples(REFERENCE_STEPS)
        self.t = (torch.arange(count, dtype=torch.float64, device=x0.device) + 0.5) / count
        self.t *= math.pi / 2
        self.x = interpolate(x0, self.noise, self.t)

    def _record_call_of_sampler(self) -> None:
        """Note the condition and the end that the method's sampler passes to a student."""

        def recorder(x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
            self.condition, self.end = condition, end
            return torch.zeros_like(x)

        sample_student(recorder, self.noise, self.labels, 1, self.config)

    def _guided(self, teacher: Network, data: Dataset, generator: Generator) -> Network:
        """The teacher with the guidance that the student's samples have."""
        if isinstance(self.condition, GuidedCondition):
            given = self.condition
            return guided(teacher, data.null_condition, given.scale, (given.low, given.high))
        scale = self.config.guidance.draw(len(self.labels), generator)
        if scale is None:
            return teacher
        interval = self.config.guidance.interval
        return guided(teacher, data.null_condition, scale.to(self.noise.device), interval)

    def _teacher_samples(self, steps: int) -> Tensor:
        times = heun_times(steps, sigma_max=self.config.sigma_max)
        return heun_sample(self.teacher, self.noise, times, self.labels)

    def teacher_rmse(self) -> float:
        """probe_rmse of the teacher as a one-step student."""
        return same_noise_rmse(self._teacher_samples(1), self.teacher_samples)

    def measure(self, student: Network, check_jvp: bool = True) -> dict[str, float]:
        """probe_rmse and probe_agreement, and jvp_cosine if check_jvp, of a student."""
        with restored_random_state(self.noise):  # dropout draws from the global random numbers
            samples = sample_student(student, self.noise, self.labels, 1, self.config)
            metrics = {
                "probe_rmse": same_noise_rmse(samples, self.teacher_samples),
                "probe_agreement": label_agreement(self.classifier.logits(samples), self.labels),
            }
            if check_jvp:
                metrics["jvp_cosine"] = self._jvp_cosine(student)
        return metrics

    @torch.no_grad()
    def _jvp_cosine(self, student: Network) -> float:
        ode_velocity = self.teacher(self.x, network_time(self.t, self.x), self.labels)
        cosine = jvp_cosine(student, self.x, self.t, ode_velocity, self.condition, end=self.end)
        return cosine.double().mean().item()
