"""dCM: a consistency model distilled in discrete time (consistency distillation, 2303.01469).

It needs no derivative of the student. rCM's code and Causal-rCM (2606.25473) use it as a warm-up
for sCM.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import get_args

from rcm.losses.discrete_consistency import discrete_consistency_loss, discrete_times
from rcm.losses.loss import Loss, Norm
from rcm.methods.samplers import ConsistencyModel
from rcm.ode import Solver
from rcm.training.ema import EMAConfig
from rcm.training.method import Averaged, Frozen, Losses, Role, Step
from rcm.validation import require_choice, require_integer, require_number, require_positive

MAX_TEACHER_STEPS = 10_000


@dataclass(frozen=True, kw_only=True)
class DCM(ConsistencyModel):
    """dCM: discrete consistency distillation."""

    teacher_steps: int = 48
    """Number of steps into which the teacher's ODE is divided."""
    skip: int = 1
    """Steps of the teacher between the two points that the loss compares."""
    shift: float = 5.0
    """Shift of the steps towards noise; 1 is none."""
    solver: Solver = "euler"
    """Solver of the teacher's ODE."""
    norm: Norm = "l2"
    """The squared error is a sum over the elements (l2) or an average (rms)."""
    target_decay: float | None = None
    """Compare with a moving average of the student that has this decay, not with the student."""
    discrete_weight: float = 1.0
    """Weight of the discrete consistency loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer(1, MAX_TEACHER_STEPS, teacher_steps=self.teacher_steps)
        require_integer(1, self.teacher_steps, skip=self.skip)
        require_positive(shift=self.shift, discrete_weight=self.discrete_weight)
        require_choice(get_args(Solver), solver=self.solver)
        require_choice(get_args(Norm), norm=self.norm)
        if self.target_decay is not None:
            require_number("[)", 0, 1, target_decay=self.target_decay)

    def roles(self) -> dict[str, Role]:
        roles: dict[str, Role] = {"student": self.student_role(), "teacher": Frozen()}
        if self.target_decay is not None:
            roles["target"] = Averaged(of="student", ema=EMAConfig(decay=self.target_decay))
        return roles

    def losses(self, step: Step) -> Losses:
        yield "student", {"discrete consistency": self.discrete_consistency(step)}

    def discrete_consistency(self, step: Step) -> Loss:
        """The weighted discrete consistency loss of a batch."""
        times = step.draw(
            partial(discrete_times, steps=self.teacher_steps, skip=self.skip, shift=self.shift)
        )
        loss = discrete_consistency_loss(
            step.student,
            step.x0,
            step.noise(),
            times,
            step.condition,
            teacher=step.guided_teacher(self.guidance),
            target=step.student if self.target_decay is None else step.target,
            solver=self.solver,
            norm=self.norm,
        )
        return self.discrete_weight * loss
