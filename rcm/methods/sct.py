"""sCT (2410.11081): sCM trained from data and noise alone, without a teacher.

The velocity of the path between a sample and its noise replaces the teacher's. Its mean given x is
the velocity of the ODE. The student may start from the teacher's weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from rcm.methods.scm import SCM
from rcm.training.method import Role, Step


@dataclass(frozen=True, kw_only=True)
class SCT(SCM):
    """sCT: consistency training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_no_guidance("sCT has no teacher to guide")

    def roles(self) -> dict[str, Role]:
        return {"student": super().roles()["student"]}

    def ode(self, step: Step) -> None:
        return None
