"""sCM (2410.11081): a consistency model distilled in continuous time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from rcm.losses.consistency import Form, consistency_loss
from rcm.losses.loss import Loss
from rcm.methods.samplers import ConsistencyModel
from rcm.methods.tangents import WithNormalizedTangent
from rcm.time_sampling import TimeDistribution
from rcm.training.method import Frozen, Losses, Role, Step
from rcm.trigflow import Network
from rcm.validation import require_choice, require_positive


@dataclass(frozen=True, kw_only=True)
class SCM(WithNormalizedTangent, ConsistencyModel):
    """sCM: consistency distillation."""

    times: TimeDistribution
    """p_G, the noise levels of the consistency loss."""
    form: Form = "scm"
    """Form of the tangent during its warm-up; see rcm/losses/consistency.py."""
    consistency_weight: float = 1.0
    """Weight of the consistency loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(get_args(Form), form=self.form)
        require_positive(consistency_weight=self.consistency_weight)

    def roles(self) -> dict[str, Role]:
        return {"student": self.student_role(), "teacher": Frozen()}

    def losses(self, step: Step) -> Losses:
        yield "student", {"consistency": self.consistency(step)}

    def consistency(self, step: Step) -> Loss:
        """The weighted consistency loss of a batch."""
        loss = consistency_loss(
            step.student,
            step.x0,
            step.noise(),
            step.times(self.times),
            step.condition,
            teacher=self.ode(step),
            warmup=self.warmup(step.iteration),
            form=self.form,
            tangent_norm=self.tangent_norm,
            tangent_norm_eps=self.tangent_norm_eps,
            log_weight=getattr(step.student, "log_weight", None),
            derivative=self.derivative,
        )
        return self.consistency_weight * loss

    def ode(self, step: Step) -> Network | None:
        """The network of the ODE that the student shortens; None is that of data and noise."""
        return step.guided_teacher(self.guidance)
