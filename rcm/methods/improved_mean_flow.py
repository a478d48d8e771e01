"""iMF, improved MeanFlow (2512.02012): MeanFlow along the student's own velocity.

The student may take classifier-free guidance as an input. Its scale is drawn for each sample, and
the student is its own guidance model, trained on samples without a label too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from rcm.guidance import GuidedCondition
from rcm.losses.loss import Loss
from rcm.methods.mean_flow import MeanFlow, Velocity
from rcm.training.method import Step
from rcm.trigflow import Network
from rcm.validation import require_number


@dataclass(frozen=True, kw_only=True)
class ImprovedMeanFlow(MeanFlow):
    """iMF: MeanFlow along its own velocity, with guidance as an input."""

    guides_student: ClassVar[bool] = True

    velocity: Velocity = "data"
    eps: float = 0.01
    """Added to the squared error in the divisor."""
    label_dropout: float = 0.1
    """Fraction of samples without a label, where guidance is active."""
    sample_scale: float = 1.0
    """Guidance scale of the samples, where guidance is active."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("()", 0, 1, label_dropout=self.label_dropout)
        require_number("()", 0, math.inf, sample_scale=self.sample_scale)

    def check_guidance(self) -> None:
        """Guidance acts on the student."""

    def mean_flow(self, step: Step) -> Loss:
        if not self.guidance.active:
            return self.loss(step, step.condition, improved=True)
        condition = step.condition_with_dropout(self.label_dropout)
        return self.loss(
            step,
            condition,
            improved=True,
            guidance=self.random_guidance(step, condition),
            null_condition=step.null_condition,
        )

    def random_guidance(self, step: Step, condition: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and interval of each sample; the scale is 1 for samples without a label."""
        scale: Tensor = step.draw(self.guidance.draw)
        unlabelled = condition == step.null_condition(condition)
        return torch.where(unlabelled, 1.0, scale), *self.interval(scale)

    def interval(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """First and last t with guidance, shaped like the scale (batch,)."""
        low, high = self.guidance.interval or (0.0, math.pi / 2)
        return torch.full_like(scale, low), torch.full_like(scale, high)

    def ode(self, step: Step) -> Network | None:
        return step.teacher if self.velocity == "teacher" else None

    def sample(
        self, student: Network, noise: Tensor, condition: Any, steps: int, noise_source: Generator
    ) -> Tensor:
        if self.guidance.active:
            scale = torch.full((len(noise),), self.sample_scale, device=noise.device)
            condition = GuidedCondition(condition, scale, *self.interval(scale))
        return super().sample(student, noise, condition, steps, noise_source)
