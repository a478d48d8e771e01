"""Methods without losses, and a classifier, to test what samples a student."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rcm.methods.samplers import ConsistencyModel, FlowMap
from rcm.training.ema import EMAConfig
from rcm.training.method import Losses, Role, Step
from rcm.training.optimization import OptimizerConfig

SETTINGS: dict[str, Any] = {
    "iterations": 1,
    "batch": 1,
    "optimizer": OptimizerConfig(lr=1e-3),
    "ema": EMAConfig(decay=0.9),
}


@dataclass(frozen=True, kw_only=True)
class OneTime(ConsistencyModel):
    def roles(self) -> dict[str, Role]:
        raise NotImplementedError

    def losses(self, step: Step) -> Losses:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TwoTimes(FlowMap):
    def roles(self) -> dict[str, Role]:
        raise NotImplementedError

    def losses(self, step: Step) -> Losses:
        raise NotImplementedError


class FirstElement:
    """Classifies a sample by the sign of its first element."""

    def features(self, samples: Tensor) -> Tensor:
        return samples.flatten(1)

    def logits(self, samples: Tensor) -> Tensor:
        first = samples.flatten(1)[:, 0]
        return torch.stack([-first, first], dim=1)
