"""What was tried on one seed, and what was chosen there for the runs that are reported.

Neither the seed of these trainings nor the noise of their samples is among those that are reported.
"""

from __future__ import annotations

CHOICE_SEED = 9
REPORTED_NOISE = ("--seed", "1")  # of rcm.evaluate; runs that choose are scored with that of seed 0

RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)
RATE = {
    "scm": 2e-4,
    "sct": 2e-4,
    "rcm": 4e-4,
    "rcm-staged": 2e-4,
    "dmd": 1e-4,
    "dcm": 2e-4,
    "lcm": 1.6e-3,
    "meanflow": 4e-4,
    "imeanflow": 3.2e-3,
    "ayf": 8e-4,
    "tvm": 3.2e-3,
}
"""The best of RATES for each method, by the study `learning-rates`."""
CRITIC = {"dmd": 4.0, "rcm": 1.0, "rcm-staged": 1.0}  # learning rate, in units of the student's

MID_TIMES = ("0.5", "0.7", "0.9", "1.1", "1.3", "1.5")
SCHEDULES = (
    "1.5,1.4,1.0",
    "1.1,0.7,0.4",
    "1.1,0.4,0.1",
    "1.0,0.5,0.2",
    "0.9,0.6,0.3",
    "0.7,0.4,0.2",
)

STEPS_OF_DIFFERENCES = {
    "float32": (1e-3, 3e-3, 1e-2, 3e-2),
    "bfloat16": (1e-3, 1e-2, 3e-2, 1e-1),
}
BEST_DIFFERENCE = {"float32": 3e-3, "bfloat16": 3e-2}
"""The best step of central differences, by the study `differences`."""


def rates_of(method: str) -> tuple[float, ...]:
    """The rates that are tried: up to twice the best one, at least up to 4e-4."""
    highest = max(4e-4, 2 * RATE[method])
    return tuple(rate for rate in RATES if rate <= highest)
