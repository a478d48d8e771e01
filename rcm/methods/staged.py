"""Staged rCM, as Causal-rCM (2606.25473) recommends: dCM, then sCM, then DMD + sCM.

DMD + sCM can be unstable while the student is far from a consistency model. The stages approach it
by losses of increasing difficulty: dCM needs no derivative of the student, sCM no critic.

The tangent warm-up starts with sCM. It can be short or 0, because its first iterations pull the
student back to the teacher's velocity, and dCM has left that behind.

One optimizer trains the student: its moments, its learning rates and the moving average continue
from stage to stage. A gradient that is much larger than in the stage before makes AdamW's first
updates larger than its learning rate. Weights or clipping keep the stages comparable.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from rcm.losses.loss import Loss
from rcm.methods.dcm import DCM
from rcm.methods.rcm import RCM
from rcm.training.method import Role, Step
from rcm.validation import require_integer


@dataclass(frozen=True, kw_only=True)
class StagedRCM(RCM, DCM):
    """Staged rCM: discrete consistency, continuous consistency, then a DMD regulariser too."""

    discrete_iterations: int
    """Iterations of the first stage, dCM."""
    continuous_iterations: int
    """Iterations of the second stage, sCM. The third, DMD + sCM, is the rest of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer(
            0,
            discrete_iterations=self.discrete_iterations,
            continuous_iterations=self.continuous_iterations,
        )
        if self.score_start >= self.iterations:
            raise ValueError(
                f"discrete_iterations + continuous_iterations is {self.score_start}; it must be "
                f"less than {self.iterations}, the iterations of the run"
            )

    @property
    def score_start(self) -> int:
        return self.discrete_iterations + self.continuous_iterations

    @property
    def student_every_start(self) -> int:
        """An alternating critic also starts before DMD."""
        return min(self.critic_start, self.score_start) if self.alternate else self.score_start

    def shortened(self) -> Self:
        return replace(
            self,
            iterations=4,
            discrete_iterations=1,
            continuous_iterations=1,
            tangent_warmup=1,
            critic_start=2,
        )

    def roles(self) -> dict[str, Role]:
        return DCM.roles(self) | RCM.roles(self)

    def student_losses(self, step: Step) -> dict[str, Loss]:
        if step.iteration < self.discrete_iterations:
            return {"discrete consistency": self.discrete_consistency(step)}
        return super().student_losses(step)

    def warmup(self, iteration: int) -> float:
        return super().warmup(iteration - self.discrete_iterations)
