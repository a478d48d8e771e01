"""rCM (2510.08431): sCM's consistency loss with DMD as a score regulariser.

During the tangent warm-up the student minimises the consistency loss alone; afterwards it also
minimises the DMD loss on its own samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from rcm.losses.consistency import Form
from rcm.losses.loss import Loss, Norm
from rcm.methods.dmd import DMD
from rcm.methods.scm import SCM
from rcm.training.method import Step


@dataclass(frozen=True, kw_only=True)
class RCM(DMD, SCM):
    """rCM: a consistency loss and a DMD regulariser with a critic."""

    form: Form = "rcm"
    tangent_norm: Norm = "l2"
    """Norm of the tangent; l2 sums over the elements, as the DMD loss does."""

    @property
    def score_start(self) -> int:
        return self.tangent_warmup

    def shortened(self) -> Self:
        iterations = 3 if self.alternate else 2
        return replace(super().shortened(), iterations=iterations)

    def student_losses(self, step: Step) -> dict[str, Loss]:
        losses = {"consistency": self.consistency(step)}
        if step.iteration >= self.score_start:
            losses["dmd"] = self.score(step)
        return losses
