"""Settings of sCM's runs on CIFAR-10 and on ImageNet at 64×64 pixels (2410.11081, appendix G).

They have been dry-run on a few images and never trained to the end. What differs from the paper:

    network     the paper has U-Nets (DDPM++; EDM2 in size S) with dropout. Here it is a DiT without
                dropout, with the paper's positional time embedding, double normalisation and w(t)
    condition   the paper's CIFAR-10 is unconditional; here the classes of the data are a condition
    optimizer   AdamW in place of RAdam (CIFAR-10) and of Adam with ε = 1e-11 (ImageNet)
    σd          the paper's is 0.5, and here samples have σd = 1. P_mean and P_std are of the
                paper's σ, and σ_max = 80 is 160 σd

Sources: G.1 is the teachers' section, G.2 the students', T4 and T8 are the tables of ImageNet 64×64
(size S), EDM is 2206.00364 and EDM2 is 2312.02696. `ours` marks what none of them gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rcm.methods.flow_matching import FlowMatching
from rcm.methods.scm import SCM
from rcm.methods.sct import SCT
from rcm.models.dit import DiTConfig
from rcm.time_sampling import LogNormal
from rcm.training.ema import EMAConfig
from rcm.training.method import Distillation
from rcm.training.optimization import OptimizerConfig

SIGMA_DATA = 0.5
CIFAR10_BATCH, IMAGENET64_BATCH = 512, 2048  # G.1, T4; students have the teacher's (G.2)
HALF_LIFE = 500_000  # images, of the average on CIFAR-10: EDM, G.2
RAMP_UP = 10_000_000  # images over which a teacher's learning rate rises: EDM, EDM2

_PAPER: dict[str, Any] = {
    "double_norm": True,  # G.1
    "time_embedding": "positional",  # G.1
    "learned_weight": True,  # section 4.2
    "label_std": 1.0,  # ours
}
CIFAR10_MODEL = DiTConfig(**_PAPER, patch=2, dim=384, depth=12, heads=6)  # ours: DiT-S/2
IMAGENET64_MODEL = DiTConfig(**_PAPER, patch=4, dim=768, depth=12, heads=12)  # ours: DiT-B/4


def _optimizer(**settings: Any) -> OptimizerConfig:
    return OptimizerConfig(
        schedule="constant",  # G.2; EDM. ours on ImageNet, where EDM2's falls with t^-½
        weight_decay=0.0,  # EDM, EDM2
        clip=math.inf,  # EDM, EDM2
        nonfinite="zero",  # EDM, EDM2
        **settings,
    )


def _times(mean: float, std: float) -> LogNormal:
    return LogNormal(mean=mean, std=std, sigma_data=SIGMA_DATA)


def _students(**settings: Any) -> Mapping[str, Distillation]:
    shared: dict[str, Any] = {
        "tangent_norm": "rms",  # ours: the paper writes ‖g‖
        "tangent_norm_eps": 0.1,  # c, G.2
        "tangent_warmup": 10_000,  # H, G.2
        "sigma_max": 80 / SIGMA_DATA,  # G.2
        "mid_times": (1.1,),  # G.2, T8
        **settings,
    }
    return {"scm": SCM(**shared), "sct": SCT(**shared)}


_CIFAR10_EMA = EMAConfig(decay=0.5 ** (CIFAR10_BATCH / HALF_LIFE))
CIFAR10_TEACHER = FlowMatching(
    iterations=400_000,  # G.1
    batch=CIFAR10_BATCH,
    optimizer=_optimizer(lr=1e-3, betas=(0.9, 0.999), warmup=RAMP_UP // CIFAR10_BATCH),  # G.1, EDM
    times=_times(-1.2, 1.2),  # EDM, whose settings G.1 takes over
    ema=_CIFAR10_EMA,
)
CIFAR10_METHODS = _students(
    iterations=400_000,  # ours: as on ImageNet
    batch=CIFAR10_BATCH,
    optimizer=_optimizer(lr=1e-4, betas=(0.9, 0.99)),  # G.2
    times=_times(-1.0, 1.4),  # G.2
    ema=_CIFAR10_EMA,
)

IMAGENET64_TEACHER = FlowMatching(
    iterations=1_048_000,  # T4
    batch=IMAGENET64_BATCH,
    # lr is ours, from DiT (2212.09748). The paper's 1e-2 is for EDM2's normalised weights.
    optimizer=_optimizer(
        lr=1e-4, betas=(0.9, 0.99), warmup=RAMP_UP // IMAGENET64_BATCH
    ),  # T4, EDM2
    times=_times(-0.8, 1.6),  # T4
    ema=EMAConfig(std=0.075),  # T4
)
IMAGENET64_METHODS = _students(
    iterations=400_000,  # T4
    batch=IMAGENET64_BATCH,
    optimizer=_optimizer(lr=1e-4, betas=(0.9, 0.99)),  # T4
    times=_times(-1.0, 1.6),  # T4
    ema=EMAConfig(std=0.05),  # G.2
)
