"""Collapse of a student: noticed by probes, explained from the metrics.

A probe compares one-step samples of the student with the teacher's samples from the same noise. The
student has collapsed if their RMSE exceeds 1.5 times its starting value in three probes in a row.
The RMSE moves before the norms of a loss do; the loss itself hardly moves.

The starting value is the RMSE of the student before its first iteration or of the teacher as a
one-step student, whichever is larger. The second matters for a student that starts from another
run's student: DMD matches the teacher's density and not its coupling of noise and samples, so it
moves a good student away from the teacher's samples without harm. The factor 1.5 leaves room for
the warm-up of rCM. It does not scale the derivative of the student in the tangent, so that the
teacher is no fixed point; on the digits the RMSE rises to 1.23 times its start and falls again.

While the last probe exceeded the limit, no checkpoint is written. The newest checkpoint is
therefore a good one, and a stopped run resumes from it. Exceptions are the last iteration of a run,
and runs that continue after a collapse.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import nn

from rcm.errors import RunError
from rcm.training.trainer import Metrics, Trainer

RMSE = "probe_rmse"
TOLERANCE = 1.5  # times the starting value is the limit of the RMSE
PATIENCE = 3  # in a row: probes, and values of a norm
JVP_EVERY = 10  # probes; the check of the JVP costs ten times as much as the rest
NORMS = ("tangent_norm", "jvp_norm", "velocity_error", "grad_norm", "loss")
MOVED = 3.0  # times the median
USUAL, MIN_USUAL = 100, 10  # iterations of the median

OnCollapse = Literal["stop", "continue"]
Measure = Callable[[nn.Module, bool], Metrics]


class CollapseError(RunError):
    """The student collapsed. The message includes the last good checkpoint."""


class CollapseWatch:
    """Probes a student every few iterations and counts the probes that exceed the limit."""

    def __init__(
        self, measure: Measure, teacher_rmse: float, *, every: int, on_collapse: OnCollapse
    ) -> None:
        """measure: (student, whether to check its JVP) -> metrics, among them "probe_rmse";
        teacher_rmse: of the teacher as a one-step student; every: iterations between probes.
        """
        self.measure, self.teacher_rmse = measure, teacher_rmse
        self.every, self.on_collapse = every, on_collapse
        self.limit = math.inf
        self.streak = 0

    def probe(self, trainer: Trainer) -> Metrics:
        """Measure the student. In iteration 0 this fixes the limit of the RMSE.

        Raises:
            RunError: the student's samples are not finite.
        """
        number = trainer.iteration // self.every
        metrics = self.measure(trainer.network, number % JVP_EVERY == 0)
        # Ranks on other hardware round differently, and must not decide differently.
        rmse = trainer.layout.mean(torch.tensor([metrics[RMSE]], dtype=torch.float64)).item()
        metrics = {**metrics, RMSE: rmse}
        if not math.isfinite(rmse):
            raise RunError(f"iteration {trainer.iteration}: samples of the student are not finite")
        if trainer.iteration == 0:
            self.limit = TOLERANCE * max(rmse, self.teacher_rmse)
            return {**metrics, f"{RMSE}_limit": self.limit}
        self.streak = self.streak + 1 if rmse > self.limit else 0
        return metrics

    @property
    def collapsed(self) -> bool:
        return self.streak >= PATIENCE

    @property
    def allows_checkpoint(self) -> bool:
        return self.streak == 0 or self.on_collapse == "continue"

    def streak_start(self, iteration: int) -> int:
        """The iteration of the first probe of the streak, given that of the last one."""
        return iteration - (self.streak - 1) * self.every

    def explain(self, iteration: int, lines: list[dict[str, Any]]) -> str:
        """What happened until this iteration, and what to do; lines are the student's metrics."""
        since = self.streak_start(iteration)
        last = [line[RMSE] for line in lines if RMSE in line][-PATIENCE:]
        healthy = since - self.every
        values = ", ".join(f"{rmse:.3g}" for rmse in last)
        moved = first_moved(lines, healthy)
        if moved is not None:
            norms = str(moved)
        elif healthy < MIN_USUAL:
            norms = "It was too early to say which norm moved first"
        else:
            norms = f"None of {', '.join(NORMS)} moved so far; usually the RMSE is first"
        return (
            f"iteration {iteration}: the student collapsed. The RMSE of its samples to the "
            f"teacher's exceeded {self.limit:.3g}, {TOLERANCE:g} times its starting value, in "
            f"{self.streak} probes in a row since iteration {since}, the last {values}. "
            f"{norms}. Start another run with a smaller --student.optimizer.lr or a longer tangent "
            "warm-up, or repeat this command with --on-collapse continue"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"limit": self.limit, "streak": self.streak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.limit, self.streak = state["limit"], state["streak"]


@dataclass(frozen=True)
class Moved:
    """A norm that left its usual range."""

    name: str
    iteration: int
    value: float
    median: float

    def __str__(self) -> str:
        return (
            f"The first norm to move was {self.name}: in iteration {self.iteration} it was "
            f"{self.value:.3g}, and {self.median:.3g} in the median before"
        )


def first_moved(lines: list[dict[str, Any]], healthy: int) -> Moved | None:
    """The norm that first exceeded three times its median for three iterations in a row, or None.

    The median is over the last 100 iterations before these, up to the last healthy one.
    """
    found = [moved for name in NORMS if (moved := _moved(name, lines, healthy)) is not None]
    return min(found, key=lambda moved: moved.iteration, default=None)


def _moved(name: str, lines: list[dict[str, Any]], healthy: int) -> Moved | None:
    usual: deque[float] = deque(maxlen=USUAL)
    above: list[Moved] = []
    for line in lines:
        if name not in line:
            continue
        iteration, value = line["iteration"], line[name]
        middle = median(usual) if len(usual) >= MIN_USUAL else math.inf
        if 0 < MOVED * middle < value:  # a loss with a learned weight can be negative
            above.append(Moved(name, iteration, value, middle))
            if len(above) == PATIENCE:
                return above[0]
        else:
            above.clear()
        if iteration <= healthy:
            usual.append(value)
    return None
