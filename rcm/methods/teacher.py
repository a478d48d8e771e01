"""Train a diffusion model, the teacher, by flow matching on data."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rcm.data.dataset import Dataset
from rcm.losses.flow_matching import flow_matching_loss
from rcm.time_sampling import LogNormal
from rcm.training.batches import Batches
from rcm.training.ema import EMA, MAX_STD, MIN_STD, power_decay
from rcm.training.method import MethodConfig, Metrics
from rcm.training.optimization import Optimization, OptimizerConfig
from rcm.validation import require_number


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(MethodConfig):
    """The teacher: a diffusion model trained by flow matching on data."""

    optimizer: OptimizerConfig
    times: LogNormal
    """Distribution of the noise level."""
    ema_std: float
    """Relative width of the power-function average of the weights; the average is the teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("()", MIN_STD, MAX_STD, ema_std=self.ema_std)

    def build(self, network: nn.Module, data: Dataset, *, seed: int) -> TeacherTraining:
        return TeacherTraining(self, network, data, seed)


class TeacherTraining:
    """Trains the network; the averaged weights become the teacher."""

    name = "teacher"

    def __init__(self, config: TeacherConfig, network: nn.Module, data: Dataset, seed: int) -> None:
        self.config = config
        self.iterations, self.iteration = config.iterations, 0
        self.network = network
        self.ema = EMA(network, power_decay(config.ema_std))
        self.optimization = Optimization(network, config.optimizer, self.iterations)
        self.batches = Batches(data, config.batch, seed=2 * seed)

    def step(self) -> Metrics:
        x0, labels = self.batches.next()
        t = self.config.times(len(x0), self.batches.generator)
        loss = flow_matching_loss(self.network, x0, self.batches.noise(x0), t, labels).value.mean()
        norm = self.optimization.step(loss, "flow matching", self.iteration)
        self.ema.update(self.network)
        self.iteration += 1
        return {"loss": loss.item(), "grad_norm": norm}

    def averaged(self) -> AbstractContextManager[nn.Module]:
        return self.ema.applied_to(self.network)

    def weights(self) -> dict[str, Tensor]:
        return self.ema.average

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimization.state_dict(),
            "batches": self.batches.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimization.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["batches"])
