"""MeanFlow (2505.13447): a flow map from its mean velocity, distilled or from data alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rcm.losses.loss import Loss, Norm
from rcm.losses.mean_flow import mean_flow_loss
from rcm.methods.samplers import FlowMap
from rcm.methods.tangents import WithTangent
from rcm.time_pairs import TimePairDistribution
from rcm.training.method import Frozen, Losses, Role, Step
from rcm.trigflow import Network
from rcm.validation import require_choice, require_number, require_positive

Velocity = Literal["teacher", "data"]


@dataclass(frozen=True, kw_only=True)
class MeanFlow(WithTangent, FlowMap):
    """MeanFlow: mean velocities of the teacher's ODE or of data and noise."""

    time_pairs: TimePairDistribution
    """Distribution of the start t and the end of the flow map."""
    velocity: Velocity = "teacher"
    """Whose velocity the student averages: the teacher's, or that of data and noise."""
    norm: Norm = "l2"
    """The squared error is a sum over the elements (l2) or an average (rms)."""
    power: float = 1.0
    """Each sample's squared error e is divided by (e + eps)^power; 0 is the plain error."""
    eps: float = 1e-3
    """Added to the squared error in the divisor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(get_args(Velocity), velocity=self.velocity)
        require_choice(get_args(Norm), norm=self.norm)
        require_number("[)", 0, math.inf, power=self.power)
        require_positive(eps=self.eps)
        self.check_guidance()

    def check_guidance(self) -> None:
        """Raise ValueError unless the guidance can act."""
        if self.velocity == "data":
            self.require_no_guidance("the velocity of data and noise has none")

    def roles(self) -> dict[str, Role]:
        roles: dict[str, Role] = {"student": self.student_role()}
        return roles | {"teacher": Frozen()} if self.velocity == "teacher" else roles

    def losses(self, step: Step) -> Losses:
        yield "student", {"mean flow": self.mean_flow(step)}

    def mean_flow(self, step: Step) -> Loss:
        """The weighted squared error of a batch."""
        return self.loss(step, step.condition)

    def loss(self, step: Step, condition: Any, **improvements: Any) -> Loss:
        """mean_flow_loss of a batch with the settings of this method."""
        t, end = step.time_pairs(self.time_pairs)
        return mean_flow_loss(
            step.student,
            step.x0,
            step.noise(),
            t,
            end,
            condition,
            teacher=self.ode(step),
            warmup=self.warmup(step.iteration),
            norm=self.norm,
            power=self.power,
            eps=self.eps,
            derivative=self.derivative,
            **improvements,
        )

    def ode(self, step: Step) -> Network | None:
        """The network whose velocity the student averages; None is that of data and noise."""
        return step.guided_teacher(self.guidance) if self.velocity == "teacher" else None
