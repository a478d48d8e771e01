"""AYF, Align Your Flow (2506.14603): a flow map distilled in continuous time.

The Eulerian loss (AYF-EMD) keeps the end fixed and moves the start along the teacher's ODE; the
Lagrangian loss (AYF-LMD) moves the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from rcm.derivatives import Derivative, exact_jvp, one_pass_jvp
from rcm.losses.consistency import consistency_loss
from rcm.losses.lagrangian import lagrangian_flow_map_loss
from rcm.losses.loss import Loss
from rcm.methods.samplers import FlowMap
from rcm.methods.tangents import WithNormalizedTangent
from rcm.time_pairs import TimePairDistribution
from rcm.training.method import Frozen, Losses, Role, Step
from rcm.validation import require_choice, require_number

Objective = Literal["emd", "lmd", "unstopped-lmd"]


@dataclass(frozen=True, kw_only=True)
class AYF(WithNormalizedTangent, FlowMap):
    """AYF: flow map distillation."""

    time_pairs: TimePairDistribution
    """Distribution of the start t and the end of the flow map."""
    objective: Objective = "emd"
    """Eulerian, Lagrangian, or Lagrangian with gradients through the derivative and teacher."""
    tangent_limit: float = 0.99
    """Largest factor of the tangent's second term; below 1 the loss contains flow matching."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(get_args(Objective), objective=self.objective)
        require_number("[]", 0, 1, tangent_limit=self.tangent_limit)
        if self.objective == "unstopped-lmd" and self.passes is not None:
            raise ValueError(
                f"passes is {self.passes!r}; it must be left out with objective 'unstopped-lmd', "
                "which evaluates the student once and has gradients through the derivative"
            )

    @property
    def derivative(self) -> Derivative:
        derivative = super().derivative
        has_gradients = self.objective == "unstopped-lmd"
        return exact_jvp if has_gradients and derivative is one_pass_jvp else derivative

    def roles(self) -> dict[str, Role]:
        return {"student": self.student_role(), "teacher": Frozen()}

    def losses(self, step: Step) -> Losses:
        yield "student", {"flow map": self.flow_map(step)}

    def flow_map(self, step: Step) -> Loss:
        """The Eulerian or the Lagrangian loss of a batch, along the ODE of the guided teacher."""
        (t, end), noise = step.time_pairs(self.time_pairs), step.noise()
        teacher = step.guided_teacher(self.guidance)
        warmup = min(self.tangent_limit, self.warmup(step.iteration))
        if self.objective == "emd":
            return consistency_loss(
                step.student,
                step.x0,
                noise,
                t,
                step.condition,
                end=end,
                teacher=teacher,
                warmup=warmup,
                tangent_norm=self.tangent_norm,
                tangent_norm_eps=self.tangent_norm_eps,
                derivative=self.derivative,
            )
        return lagrangian_flow_map_loss(
            step.student,
            step.x0,
            noise,
            t,
            end,
            step.condition,
            teacher=teacher,
            stopped=self.objective == "lmd",
            warmup=warmup,
            tangent_norm=self.tangent_norm,
            tangent_norm_eps=self.tangent_norm_eps,
            derivative=self.derivative,
        )
