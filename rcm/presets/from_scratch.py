"""Presets that train their own teacher on labelled images and distil it.

    digits     1797 real digits of 8×8 pixels, in a few minutes on a CPU
    mnist-14   5000 images of MNIST, averaged to 14×14 pixels
    mnist-28   the same with 28×28 pixels
    images     images of one's own, of any size: settings to start from
    cifar10    images of 32×32 pixels with the settings of sCM's paper (scm_paper.py)
    imagenet64 the same for 64×64 pixels

The last three read the images that --data.folder names (docs/data.md). Each preset is a data set, a
network, a teacher and a table of methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rcm.data.dataset import LabelledDataConfig
from rcm.data.digits import DigitsConfig
from rcm.data.images import ImagesConfig
from rcm.data.mnist import MNISTConfig
from rcm.methods.flow_matching import FlowMatching
from rcm.models.dit import DiTConfig
from rcm.presets.methods import METHODS
from rcm.presets.scm_paper import (
    CIFAR10_METHODS,
    CIFAR10_MODEL,
    CIFAR10_TEACHER,
    IMAGENET64_METHODS,
    IMAGENET64_MODEL,
    IMAGENET64_TEACHER,
)
from rcm.time_sampling import LogNormal
from rcm.training.config import FromScratchConfig
from rcm.training.ema import EMAConfig
from rcm.training.method import Distillation
from rcm.training.optimization import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class FromScratch:
    """What one preset trains, and on what."""

    data: LabelledDataConfig
    model: DiTConfig
    teacher: FlowMatching
    methods: Mapping[str, Distillation]
    default_method: str = "meanflow"  # one of the two best of docs/methods.md
    evaluation_samples: int = 2000
    report_every: int = 300
    probe_every: int = 10
    checkpoint_every: int = 200
    device: str = "cpu"
    threads: int = 1

    def config(self, preset: str, method: str) -> FromScratchConfig:
        model = self.model
        if method == "imeanflow":  # a teacher without these parts loads into it too
            model = replace(model, null_class=True, guidance_input=True, auxiliary_head=True)
        return FromScratchConfig(
            preset=preset,
            method=method,
            device=self.device,
            threads=self.threads,
            data=self.data,
            model=model,
            teacher=self.teacher,
            student=self.methods[method],
            report_every=self.report_every,
            probe_every=self.probe_every,
            evaluation_samples=self.evaluation_samples,
            checkpoint_every=self.checkpoint_every,
        )


# Expected results: docs/digits.md.
DIGITS = FromScratch(
    data=DigitsConfig(),
    model=DiTConfig(dim=64, depth=3, heads=4),  # 250k parameters
    teacher=FlowMatching(
        iterations=4000,
        batch=64,
        optimizer=OptimizerConfig(lr=2e-3, warmup=100),
        times=LogNormal(mean=-0.4, std=1.4),
        ema=EMAConfig(std=0.1),
    ),
    methods=METHODS,
    evaluation_samples=1797,
)
# 49 tokens in both cases, and about 550k parameters. With label embeddings of standard deviation
# 0.02 at first, the teacher needs thousands of iterations more to follow its labels.
MNIST_14 = FromScratch(
    data=MNISTConfig(side=14),
    model=DiTConfig(patch=2, dim=96, depth=3, heads=4, label_std=1.0),
    teacher=FlowMatching(
        iterations=10_000,
        batch=64,
        optimizer=OptimizerConfig(lr=2e-3, warmup=100),
        times=LogNormal(mean=0.2, std=1.4),
        ema=EMAConfig(std=0.1),
    ),
    methods=METHODS,
)
MNIST_28 = replace(MNIST_14, data=MNISTConfig(side=28), model=replace(MNIST_14.model, patch=4))
IMAGES = FromScratch(
    data=ImagesConfig(),
    model=DiTConfig(patch=4, dim=128, depth=4, heads=4, label_std=1.0),  # 1.3M parameters
    teacher=replace(MNIST_14.teacher, iterations=10_000),
    methods=METHODS,
)
_PAPER: dict[str, Any] = {
    "data": ImagesConfig(),
    "default_method": "scm",
    "evaluation_samples": 50_000,
    "report_every": 10_000,
    "probe_every": 100,
    "checkpoint_every": 1000,
    "device": "cuda",
    "threads": 8,
}
CIFAR10 = FromScratch(
    **_PAPER, model=CIFAR10_MODEL, teacher=CIFAR10_TEACHER, methods=CIFAR10_METHODS
)
IMAGENET64 = FromScratch(
    **_PAPER, model=IMAGENET64_MODEL, teacher=IMAGENET64_TEACHER, methods=IMAGENET64_METHODS
)

FROM_SCRATCH: Mapping[str, FromScratch] = {
    "digits": DIGITS,
    "mnist-14": MNIST_14,
    "mnist-28": MNIST_28,
    "images": IMAGES,
    "cifar10": CIFAR10,
    "imagenet64": IMAGENET64,
}
