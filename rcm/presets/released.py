"""Settings of rCM's published runs (2510.08431), by the name of the run.

`-released` has the values of the published code (github.com/NVlabs/rcm at 5b41aa9), `-paper` those
of the paper, and the released ones where the tables of the paper are silent. The code has no config
for Cosmos-Predict2.

The trainer is the same in all of them: an iteration trains the student or the critic, learning
rates are constant after a warm-up, gradients are not clipped and their non-finite elements become
zero, and losses are sums over the elements of a sample.
"""

import math
from collections.abc import Mapping
from typing import Any

from rcm.guidance import Guidance
from rcm.methods.rcm import RCM
from rcm.time_sampling import LogNormal, ShiftedUniform
from rcm.training.ema import EMAConfig
from rcm.training.optimization import OptimizerConfig

# A guidance scale g means uncond + g (cond - uncond), as in that code. Its first versions computed
# cond + g (cond - uncond), as Cosmos2TextToImagePipeline does: a g of these is g + 1 here. The
# paper's 5.0 and 4.5 may be of either kind; they are taken as they are.

# Sources: C is configs/experiments/rcm/wan2pt1_t2v.py and M is models/t2v_model_distill_rcm.py of
# the code, followed by the line.

_WAN = {
    "guidance": Guidance(scale=5.0),  # with a negative prompt, C:121
    "score_times": ShiftedUniform(shift=5.0),  # C:105, C:196
}
_COSMOS = {
    "guidance": Guidance(scale=4.5),  # paper
    "score_times": LogNormal(mean=0.0, std=1.6),  # paper, and the defaults of M:88
}
_CODE = {"ema": EMAConfig(std=0.10), "mid_times": (1.5, 1.4, 1.0)}
_PAPER = {"ema": EMAConfig(std=0.05), "mid_times": (1.3, 1.0, 0.6)}


def _optimizer(lr: float) -> OptimizerConfig:
    return OptimizerConfig(
        lr=lr,
        schedule="constant",
        warmup=100,  # scheduler.py:23
        betas=(0.0, 0.999),  # C:95
        weight_decay=0.01,  # C:95, optimizer.py:37
        clip=math.inf,  # C:109
        nonfinite="zero",  # grad_clip.py:29
    )


def _rcm(
    family: dict[str, Any],
    source: dict[str, Any],
    lr: float,
    critic_lr: float,
    student_every: int,
    tangent_warmup: int,
    mean: float,
    sigma_max: float,
    batch: int,
    iterations: int,
) -> RCM:
    return RCM(
        **family,
        **source,
        iterations=iterations,
        batch=batch,
        optimizer=_optimizer(lr),
        critic_optimizer=_optimizer(critic_lr),
        sigma_max=sigma_max,
        times=LogNormal(mean=mean, std=1.6),
        tangent_warmup=tangent_warmup,
        consistency_weight=100.0,  # the ratio of the weights is the paper's λ = 0.01
        score_weight=1.0,
        critic_norm="l2",  # M:693
        alternate=True,  # M:294
        student_every=student_every,
        rollout_steps=4,  # M:645, M:683
        rollout_length="cycle",
    )


#   lr, critic  peak learning rates of student and critic          C:94,113; C:178,189; paper
#   every       iterations for each update of the student          C:111; C:187; paper
#   warmup      of the tangent, in iterations                      C:122; C:193; paper
#   p_G         mean of log σ in the consistency loss, std 1.6     C:104; C:195; paper, M:88
#   σ_max       noise level at which sampling starts               C:108; C:194; Cosmos: default
#   batch       of all GPUs together                               C:102...222; paper
#   iterations  of student and critic together                     NVlabs/rcm#11, 14B: 3k to 4k
#
# fmt: off
METHODS: Mapping[str, RCM] = {
    #                                            lr critic every warmup   p_G σ_max batch iterations
    "wan-1.3b-released": _rcm(_WAN,    _CODE,  2e-6,  4e-7,    5,  1000,  0.7,   80,    8,  10_000),
    "wan-1.3b-paper":    _rcm(_WAN,    _PAPER, 2e-6,  4e-7,    5,  1000,  0.7,   80,  256,  10_000),
    "wan-14b-released":  _rcm(_WAN,    _CODE,  1e-6,  1e-7,   10,     0,  1.5,  200,    4,   4_000),
    "wan-14b-paper":     _rcm(_WAN,    _PAPER, 1e-6,  1e-7,   10,   200,  1.5,  200,   64,   4_000),
    "cosmos-0.6b-paper": _rcm(_COSMOS, _PAPER, 1e-6,  2e-7,    5,     0, -0.8,   80, 1024,  80_000),
    "cosmos-2b-paper":   _rcm(_COSMOS, _PAPER, 1e-6,  2e-7,    5,     0, -0.8,   80,  512,  30_000),
    "cosmos-14b-paper":  _rcm(_COSMOS, _PAPER, 1e-6,  2e-7,    5,     0, -0.8,   80,  256,  25_000),
}
# fmt: on
