"""TVM, terminal velocity matching (2511.19797): a flow map from the velocity at its end.

It trains on data alone. The velocity at the end of a jump is that of a moving average of the
student, and the gradient flows through the derivative of the student.
"""

from __future__ import annotations

from dataclasses import dataclass

from rcm.losses.loss import Loss
from rcm.losses.terminal_velocity import terminal_velocity_loss
from rcm.methods.samplers import FlowMap
from rcm.methods.tangents import WithDerivative
from rcm.time_pairs import TimePairDistribution
from rcm.time_sampling import TimeDistribution
from rcm.training.ema import EMAConfig
from rcm.training.method import Averaged, Losses, Role, Step
from rcm.validation import require_number, require_positive


@dataclass(frozen=True, kw_only=True)
class TVM(WithDerivative, FlowMap):
    """TVM: terminal velocity matching."""

    time_pairs: TimePairDistribution
    """Distribution of the start t and the end of the flow map."""
    flow_matching_times: TimeDistribution
    """Noise levels of the flow matching term."""
    target_decay: float = 0.99
    """Decay of the moving average whose velocity is the target."""
    terminal_weight: float = 1.0
    """Weight of the terminal velocity."""
    flow_matching_weight: float = 1.0
    """Weight of flow matching."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("[)", 0, 1, target_decay=self.target_decay)
        require_positive(
            terminal_weight=self.terminal_weight, flow_matching_weight=self.flow_matching_weight
        )
        self.require_no_guidance("TVM has no teacher to guide")

    def roles(self) -> dict[str, Role]:
        target = Averaged(of="student", ema=EMAConfig(decay=self.target_decay))
        return {"student": self.student_role(), "target": target}

    def losses(self, step: Step) -> Losses:
        yield "student", {"terminal velocity": self.terminal_velocity(step)}

    def terminal_velocity(self, step: Step) -> Loss:
        """The terminal velocity and flow matching terms of a batch."""
        t, end = step.time_pairs(self.time_pairs)
        return terminal_velocity_loss(
            step.student,
            step.x0,
            step.noise(),
            t,
            end,
            step.condition,
            target=step.target,
            flow_matching_times=step.times(self.flow_matching_times),
            terminal_weight=self.terminal_weight,
            flow_matching_weight=self.flow_matching_weight,
            derivative=self.derivative,
        )
