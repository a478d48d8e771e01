"""Flow matching (sCM, 2410.11081 §3): train a diffusion model on data, as a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rcm.losses.flow_matching import flow_matching_loss
from rcm.time_sampling import TimeDistribution
from rcm.training.method import SCRATCH, Losses, Method, Role, Step, Trained
from rcm.validation import require_number


@dataclass(frozen=True, kw_only=True)
class FlowMatching(Method):
    """The teacher: a diffusion model trained by flow matching on data."""

    result: ClassVar[str] = "teacher"

    times: TimeDistribution
    """Distribution of the noise level."""
    label_dropout: float = 0.0
    """Fraction of samples without a label; classifier-free guidance needs about 0.1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("[)", 0, 1, label_dropout=self.label_dropout)

    @property
    def trains_null_condition(self) -> bool:
        return self.label_dropout > 0

    def roles(self) -> dict[str, Role]:
        return {"teacher": Trained(optimizer=self.optimizer, ema=self.ema, start=SCRATCH)}

    def losses(self, step: Step) -> Losses:
        t = step.times(self.times)
        condition = step.condition_with_dropout(self.label_dropout)
        loss = flow_matching_loss(step.teacher, step.x0, step.noise(), t, condition)
        yield "teacher", {"flow matching": loss}
