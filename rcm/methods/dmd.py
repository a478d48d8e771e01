"""DMD2 (2405.14867): move the student's samples towards the teacher's density.

A critic, the "fake score", learns the score of the student's samples by flow matching. The student
descends the difference of the two scores on its own samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from rcm.losses.flow_matching import flow_matching_loss
from rcm.losses.loss import Loss, Norm
from rcm.losses.score import score_loss
from rcm.methods.samplers import ConsistencyModel
from rcm.sampling import consistency_sample
from rcm.time_sampling import TimeDistribution, rollout_times
from rcm.training.method import Frozen, Losses, Role, Step, Trained
from rcm.training.optimization import OptimizerConfig
from rcm.validation import require_choice, require_integer, require_positive

MAX_ROLLOUT_STEPS = 1000  # each is an evaluation of the network in every iteration

RolloutLength = Literal["random", "cycle"]


@dataclass(frozen=True, kw_only=True)
class DMD(ConsistencyModel):
    """DMD2: distribution matching with a critic."""

    critic_optimizer: OptimizerConfig
    score_times: TimeDistribution
    """p_D, the noise levels of the DMD loss, the critic and the rollout."""
    critic_start: int = 0
    """Iteration at which the critic's training starts; it should precede the start of DMD."""
    critic_norm: Norm = "rms"
    """The critic's loss is an average over the elements (rms) or a sum (l2), as in rCM's code."""
    student_every: int = 1
    """Once DMD has started, the student is trained once in this many iterations."""
    alternate: bool = False
    """As in rCM's code, an iteration trains the student or the critic instead of both; dmd and rcm
    then start both DMD and the critic's training at once."""
    score_weight: float = 1.0
    """Weight of the DMD loss."""
    rollout_steps: int = 2
    """Maximum number of steps of the student's samples for DMD and the critic."""
    rollout_length: RolloutLength = "random"
    """Draw the number of steps, or cycle through 1, 2, ... with a network's updates."""
    rollout_at_mid_times: bool = False
    """Evaluate the steps 2, 3, ... of a rollout at mid_times instead of random times."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer(0, critic_start=self.critic_start)
        require_integer(1, student_every=self.student_every)
        require_positive(score_weight=self.score_weight)
        require_integer(1, MAX_ROLLOUT_STEPS, rollout_steps=self.rollout_steps)
        require_choice(get_args(RolloutLength), rollout_length=self.rollout_length)
        require_choice(get_args(Norm), critic_norm=self.critic_norm)
        if self.alternate and self.student_every == 1:
            raise ValueError(
                "student_every is 1; with alternate it must be at least 2, or the critic is never "
                "trained"
            )
        if self.rollout_at_mid_times and self.rollout_steps > self.max_steps:
            raise ValueError(
                f"rollout_steps is {self.rollout_steps}; with rollout_at_mid_times it must be at "
                f"most {self.max_steps}, because there are {self.max_steps - 1} mid_times"
            )

    def with_mid_times(self, mid_times: tuple[float, ...]) -> Self:
        # Rollouts, which may have more steps, are part of training.
        return replace(self, mid_times=mid_times, rollout_at_mid_times=False)

    @property
    def score_start(self) -> int:
        """Iteration at which DMD starts."""
        return 0

    @property
    def student_every_start(self) -> int:
        """Iteration from which on student_every applies."""
        return self.score_start

    def shortened(self) -> Self:
        return replace(super().shortened(), critic_start=0)

    def roles(self) -> dict[str, Role]:
        critic = Trained(optimizer=self.critic_optimizer)
        return {"student": self.student_role(), "critic": critic, "teacher": Frozen()}

    def losses(self, step: Step) -> Losses:
        if self.trains_student(step.iteration):
            yield "student", self.student_losses(step)
        if self.trains_critic(step.iteration):
            yield "critic", {"flow matching": self.critic(step)}

    def trains_student(self, iteration: int) -> bool:
        after = iteration - self.student_every_start
        return after < 0 or after % self.student_every == 0

    def trains_critic(self, iteration: int) -> bool:
        if self.alternate:
            return not self.trains_student(iteration)
        return iteration >= self.critic_start

    def student_losses(self, step: Step) -> dict[str, Loss]:
        """The losses of the student in an iteration that trains it."""
        return {"dmd": self.score(step)}

    def score(self, step: Step) -> Loss:
        """The weighted DMD loss of a rollout."""
        loss = score_loss(
            self.rollout(step, "student"),
            step.noise(),
            step.times(self.score_times),
            step.condition,
            teacher=step.guided_teacher(self.guidance),
            fake_score=step.critic,
        )
        return self.score_weight * loss

    def critic(self, step: Step) -> Loss:
        """The critic's flow matching loss on a rollout."""
        with torch.no_grad():
            generated = self.rollout(step, "critic")
        t = step.times(self.score_times)
        return flow_matching_loss(
            step.critic, generated, step.noise(), t, step.condition, norm=self.critic_norm
        )

    def rollout(self, step: Step, role: str) -> Tensor:
        """Samples of the student after 1 to `rollout_steps` steps.

        Its length follows the updates of the role that it trains.
        """
        if self.rollout_length == "cycle":
            steps = step.updates[role] % self.rollout_steps + 1
        else:
            steps = step.integer(1, self.rollout_steps)
        if self.rollout_at_mid_times:
            times = torch.tensor([math.pi / 2, *self.mid_times[: steps - 1]], dtype=torch.float64)
        else:
            times = step.draw(lambda n, g: rollout_times(steps, n, self.score_times, g))
        noise, *later_noise = [step.noise() for _ in range(steps)]
        return consistency_sample(
            step.student, noise, times, step.condition, noise_source=later_noise
        )
