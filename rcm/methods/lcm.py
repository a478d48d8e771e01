"""LCM (2310.04378): a consistency model distilled on the timesteps of DDPM.

The student is f = c_skip x + c_out x̂0, which is x at timestep 0. It follows the teacher with
guidance, whose scale may be drawn for each sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from rcm.losses.lcm import lcm_loss, lcm_network, lcm_timesteps
from rcm.losses.loss import Loss
from rcm.sampling import consistency_sample
from rcm.time_conversions import VPSchedule
from rcm.training.ema import EMAConfig
from rcm.training.method import Averaged, Distillation, Frozen, Losses, Role, Step
from rcm.trigflow import Network
from rcm.validation import require_integer, require_number, require_positive

TIMESTEPS = 1000
SCHEDULE = VPSchedule.linear(timesteps=TIMESTEPS)


@dataclass(frozen=True, kw_only=True)
class LCM(Distillation):
    """LCM: latent consistency distillation, on the 1000 timesteps of DDPM's linear schedule."""

    skip: int = 20
    """Timesteps between the two points that the loss compares, and between sampling times."""
    huber_c: float = 1e-3
    """Size of an element's error where the loss changes from quadratic to linear."""
    target_decay: float = 0.95
    """Decay of the moving average of the student that is the target."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer(2, TIMESTEPS, skip=self.skip)
        require_positive(huber_c=self.huber_c)
        require_number("[)", 0, 1, target_decay=self.target_decay)

    @property
    def max_steps(self) -> int:
        return TIMESTEPS // self.skip

    def roles(self) -> dict[str, Role]:
        target = Averaged(of="student", ema=EMAConfig(decay=self.target_decay))
        return {"student": self.student_role(), "target": target, "teacher": Frozen()}

    def losses(self, step: Step) -> Losses:
        yield "student", {"consistency": self.consistency(step)}

    def consistency(self, step: Step) -> Loss:
        """The pseudo-Huber loss of a batch between neighbouring timesteps."""
        timestep, next_timestep = step.draw(
            partial(lcm_timesteps, timesteps=TIMESTEPS, skip=self.skip)
        )
        return lcm_loss(
            step.student,
            step.x0,
            step.noise(),
            timestep,
            next_timestep,
            step.condition,
            schedule=SCHEDULE,
            teacher=step.guided_teacher(self.guidance),
            target=step.target,
            huber_c=self.huber_c,
        )

    def sample(
        self, student: Network, noise: Tensor, condition: Any, steps: int, noise_source: Generator
    ) -> Tensor:
        """Four steps of skip 20 are the timesteps 999, 759, 499 and 259."""
        require_integer(1, self.max_steps, steps=steps)
        index = torch.arange(steps) * self.max_steps // steps
        times = SCHEDULE.t((self.max_steps - index) * self.skip - 1)
        network = lcm_network(student, SCHEDULE)
        return consistency_sample(network, noise, times, condition, noise_source=noise_source)
