"""The quantities of metrics.jsonl that are drawn over the training."""

from __future__ import annotations

from dataclasses import dataclass

EVALUATION = "frechet_distance"  # of an evaluation: a line that names its samples
ONE_STEP = "student, 1 step"  # the samples whose distance is drawn


@dataclass(frozen=True)
class Quantity:
    """A quantity by its name in metrics.jsonl, and how it is drawn."""

    name: str
    title: str
    meaning: str
    logarithmic: bool = False
    limit: bool = False
    """Draw probe_rmse_limit too."""


QUANTITIES = (
    Quantity("loss", "Loss", "mean of a batch"),
    Quantity("probe_rmse", "Probe RMSE", "to the teacher; dotted: limit of a collapse", limit=True),
    Quantity("probe_agreement", "Probe label agreement", "of one-step samples"),
    Quantity(EVALUATION, "FD", "of one-step samples, averaged weights", True),
    Quantity("tangent_norm", "Tangent norm", "‖g‖ before normalisation", True),
    Quantity("jvp_norm", "JVP norm", "‖D‖ along the teacher's ODE", True),
    Quantity("velocity_error", "Velocity error", "‖F − V‖ to the teacher", True),
    Quantity("grad_norm", "Gradient norm", "before clipping", True),
)
PER_ITERATION = tuple(q.name for q in QUANTITIES if q.name != EVALUATION)
