"""Settings of every method for small images, in runs of minutes on a CPU.

They were chosen on the digits, the learning rates and the mid times by docs/methods.md, and the
presets of small images share them.
"""

from typing import Any

from rcm.methods.ayf import AYF
from rcm.methods.dcm import DCM
from rcm.methods.dmd import DMD
from rcm.methods.improved_mean_flow import ImprovedMeanFlow
from rcm.methods.lcm import LCM
from rcm.methods.mean_flow import MeanFlow
from rcm.methods.rcm import RCM
from rcm.methods.scm import SCM
from rcm.methods.sct import SCT
from rcm.methods.staged import StagedRCM
from rcm.methods.tvm import TVM
from rcm.time_pairs import UniformEnd
from rcm.time_sampling import LogNormal
from rcm.training.ema import EMAConfig
from rcm.training.method import Distillation
from rcm.training.optimization import OptimizerConfig

TIMES = LogNormal(mean=0.0, std=1.6)


def _student(lr: float) -> dict[str, Any]:
    """What all students share, but for the learning rate."""
    return {
        "iterations": 1200,
        "batch": 64,
        "optimizer": OptimizerConfig(lr=lr),
        "ema": EMAConfig(decay=0.995),
    }


# Two and four steps of consistency models are better with these mid times than with those of rCM's
# code, 1.5, 1.4 and 1.0, which DMD keeps, because its student follows no ODE.
_MID_TIMES = (0.9, 0.6, 0.3)
_CONSISTENCY: dict[str, Any] = {"times": TIMES, "mid_times": _MID_TIMES}
_CRITIC: dict[str, Any] = {"critic_optimizer": OptimizerConfig(lr=1e-4), "score_times": TIMES}
_DISCRETE: dict[str, Any] = {"teacher_steps": 16, "shift": 1.0, "solver": "heun"}
# The MeanFlow paper's times, LogNormal(mean=-0.4, std=1), almost never reach the noise that
# one-step sampling starts from. Its weight 1 / (e + 1e-3) gives errors near zero, which are those
# at end = t, up to 1000 times the weight of the others.
_MEAN_FLOW: dict[str, Any] = {
    "time_pairs": UniformEnd(times=TIMES),
    "tangent_warmup": 300,
    "norm": "rms",
    "power": 0.5,
    "eps": 0.01,
}

METHODS: dict[str, Distillation] = {
    # Twice as many iterations as docs/methods.md gives it, at a rate that is stable for them.
    "rcm": RCM(
        **_student(1e-4),
        **_CONSISTENCY,
        **_CRITIC,
        tangent_warmup=600,
        critic_start=300,
        score_weight=0.1,
    ),
    "rcm-staged": StagedRCM(
        **_student(1e-4),
        **_CONSISTENCY,
        **_CRITIC,
        **_DISCRETE,
        discrete_iterations=200,
        continuous_iterations=600,
        tangent_warmup=0,  # dCM has left the teacher's velocity, to which a warm-up would return
        critic_start=600,
        score_weight=0.1,
    ),
    # Twice this rate is a little better on the digits, and unstable on mnist-14.
    "scm": SCM(**_student(1e-4), **_CONSISTENCY, tangent_warmup=600),
    "sct": SCT(**_student(1e-4), **_CONSISTENCY, tangent_warmup=600),
    # For a student of scm (--student.start). The critic must follow the student closely: with equal
    # rates of 1e-4 the diversity falls from 89 % to 75 % of the teacher's, and the FD doubles.
    "dmd": DMD(
        **_student(5e-5) | {"iterations": 300},
        critic_optimizer=OptimizerConfig(lr=2e-4),
        score_times=TIMES,
    ),
    "dcm": DCM(**_student(2e-4), mid_times=_MID_TIMES, **_DISCRETE, norm="rms"),
    # In a short run, 20 steps of the teacher teach one-step samples better than the paper's 50.
    "lcm": LCM(**_student(1.6e-3), skip=50),
    "meanflow": MeanFlow(**_student(4e-4), **_MEAN_FLOW),
    # The paper trains with guidance of random scales. In runs as short as these, samples at scale 1
    # are then less diverse. --student.guidance.max-scale 2 turns it on.
    "imeanflow": ImprovedMeanFlow(**_student(3.2e-3), **_MEAN_FLOW),
    "ayf": AYF(**_student(8e-4), time_pairs=UniformEnd(times=TIMES), tangent_warmup=300),
    "tvm": TVM(**_student(3.2e-3), time_pairs=UniformEnd(times=TIMES), flow_matching_times=TIMES),
}
