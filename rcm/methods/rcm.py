"""rCM (2510.08431): distil a teacher with a consistency loss and a DMD regulariser.

Every iteration trains the student, the critic or both. During the tangent warm-up the student
minimises the consistency loss alone; afterwards it also minimises the DMD loss on its own samples.
The critic learns the student's score by flow matching on the student's samples.
"""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Generator, Tensor, nn

from rcm.data.dataset import Dataset
from rcm.errors import RunError
from rcm.losses.consistency import Form, TangentNorm, consistency_loss
from rcm.losses.flow_matching import flow_matching_loss
from rcm.losses.loss import Loss
from rcm.losses.score import score_loss
from rcm.sampling import MID_TIMES, consistency_sample, consistency_times
from rcm.time_sampling import LogNormal, rollout_times
from rcm.training.batches import Batches
from rcm.training.ema import EMA, constant_decay
from rcm.training.method import DistillationConfig, Metrics
from rcm.training.optimization import Optimization, OptimizerConfig
from rcm.trigflow import Network
from rcm.validation import (
    require_choice,
    require_integer,
    require_number,
    require_numbers,
    require_positive,
)

MAX_ROLLOUT_STEPS = 1000  # each is an evaluation of the network in every iteration


@dataclass(frozen=True, kw_only=True)
class RCMConfig(DistillationConfig):
    """The distillation, rCM: a consistency loss and a DMD regulariser with a critic."""

    student_every: int
    """After the tangent warm-up, the student is trained once in this many iterations."""
    optimizer: OptimizerConfig
    critic_optimizer: OptimizerConfig
    times: LogNormal
    """p_G, the noise levels of the consistency loss."""
    score_times: LogNormal
    """p_D, the noise levels of the DMD regulariser, the critic and the rollout."""
    tangent_warmup: int
    """Iterations over which the second term of the tangent is ramped up. DMD starts afterwards."""
    critic_start: int
    """Iteration at which the critic's training starts. It should precede the start of DMD."""
    form: Form = "rcm"
    """Form of the tangent during its warm-up; see rcm/losses/consistency.py."""
    tangent_norm: TangentNorm = "l2"
    """Norm that normalises the tangent: rms averages over the elements, l2 sums."""
    tangent_norm_eps: float = 0.1
    """Added to the norm of the tangent; c in the sCM paper."""
    score_weight: float
    """Weight of the DMD regulariser; 0 is pure sCM without a critic."""
    rollout_steps: int = 2
    """Maximum number of steps of the student's samples for DMD and the critic."""
    ema: float
    """Decay of the moving average of the weights; the average is the student."""
    mid_times: tuple[float, ...] = MID_TIMES
    """Times of the sampling steps 2, 3, ...; they decrease, from below atan(sigma_max)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer(1, student_every=self.student_every)
        require_integer(0, tangent_warmup=self.tangent_warmup, critic_start=self.critic_start)
        require_integer(1, MAX_ROLLOUT_STEPS, rollout_steps=self.rollout_steps)
        require_choice(get_args(Form), form=self.form)
        require_choice(get_args(TangentNorm), tangent_norm=self.tangent_norm)
        require_positive(tangent_norm_eps=self.tangent_norm_eps)
        require_number("[)", 0, math.inf, score_weight=self.score_weight)
        require_number("[)", 0, 1, ema=self.ema)
        require_numbers(None, mid_times=self.mid_times)
        first = math.atan(self.sigma_max)
        if not all(t > later for t, later in pairwise((first, *self.mid_times, 0))):
            raise ValueError(
                f"mid_times is {self.mid_times}; it must be numbers that decrease, from below "
                f"atan(sigma_max) = {first:.4g} to above 0"
            )

    @property
    def max_steps(self) -> int:
        return len(self.mid_times) + 1

    def build(self, network: nn.Module, data: Dataset, *, seed: int) -> RCMDistillation:
        return RCMDistillation(self, network, data, seed)

    def shortened(self) -> RCMConfig:
        """Two iterations that exercise the consistency loss, DMD and the critic."""
        return replace(self, iterations=2, tangent_warmup=1, critic_start=0)

    def sample(
        self,
        student: Network,
        noise: Tensor,
        condition: Any,
        steps: int,
        noise_source: Generator,
    ) -> Tensor:
        times = consistency_times(steps, sigma_max=self.sigma_max, mid_times=self.mid_times)
        return consistency_sample(student, noise, times, condition, noise_source=noise_source)


class RCMDistillation:
    """Distils a frozen teacher; student and critic start as copies of it."""

    name = "student"

    def __init__(self, config: RCMConfig, teacher: nn.Module, data: Dataset, seed: int) -> None:
        self.config = config
        self.iterations, self.iteration = config.iterations, 0
        self.teacher = teacher.requires_grad_(False)
        self.student = copy.deepcopy(teacher).requires_grad_(True)
        self.critic = copy.deepcopy(teacher).requires_grad_(True)
        self.ema = EMA(self.student, constant_decay(config.ema))
        self.student_optimization = Optimization(self.student, config.optimizer, self.iterations)
        self.critic_optimization = Optimization(
            self.critic, config.critic_optimizer, self.iterations
        )
        self.batches = Batches(data, config.batch, seed=2 * seed + 1)

    def step(self) -> Metrics:
        metrics: Metrics = {}
        x0, labels = self.batches.next()
        warm = self.iteration >= self.config.tangent_warmup
        if not warm or self.iteration % self.config.student_every == 0:
            metrics |= self._step_student(x0, labels, regularised=warm)
        if self.config.score_weight > 0 and self.iteration >= self.config.critic_start:
            metrics |= self._step_critic(x0, labels)
        self.iteration += 1
        return metrics

    def _step_student(self, x0: Tensor, labels: Tensor, *, regularised: bool) -> Metrics:
        config, generator = self.config, self.batches.generator
        loss = consistency_loss(
            self.student,
            x0,
            self.batches.noise(x0),
            config.times(len(x0), generator),
            labels,
            teacher=self.teacher,
            warmup=min(1.0, self.iteration / max(1, config.tangent_warmup)),
            form=config.form,
            tangent_norm=config.tangent_norm,
            tangent_norm_eps=config.tangent_norm_eps,
        )
        self._require_finite_samples(loss, "nonfinite", "consistency")
        if regularised and config.score_weight > 0:
            dmd = score_loss(
                self._rollout(x0, labels),
                self.batches.noise(x0),
                config.score_times(len(x0), generator),
                labels,
                teacher=self.teacher,
                fake_score=self.critic,
            )
            self._require_finite_samples(dmd, "dmd_nonfinite", "DMD")
            loss = loss + config.score_weight * dmd
        norm = self.student_optimization.step(loss.value.mean(), "student", self.iteration)
        self.ema.update(self.student)
        means = {name: values.mean().item() for name, values in loss.diagnostics.items()}
        return {"loss": loss.value.mean().item(), "grad_norm": norm, **means}

    def _step_critic(self, x0: Tensor, labels: Tensor) -> Metrics:
        with torch.no_grad():
            generated = self._rollout(x0, labels)
        t = self.config.score_times(len(x0), self.batches.generator)
        noise = self.batches.noise(x0)
        loss = flow_matching_loss(self.critic, generated, noise, t, labels).value.mean()
        self.critic_optimization.step(loss, "critic", self.iteration)
        return {"critic_loss": loss.item()}

    def _rollout(self, like: Tensor, labels: Tensor) -> Tensor:
        """Samples of the student after 1 to `rollout_steps` steps at random times."""
        generator = self.batches.generator
        steps = self.batches.integer(1, self.config.rollout_steps)
        times = rollout_times(steps, len(like), self.config.score_times, generator)
        return consistency_sample(
            self.student, self.batches.noise(like), times, labels, noise_source=generator
        )

    def _require_finite_samples(self, loss: Loss, count: str, term: str) -> None:
        """Stop if no sample is finite; a loss masks single non-finite samples by itself."""
        if bool((loss.diagnostics[count] == 1).all()):
            raise RunError(f"iteration {self.iteration + 1}: the {term} loss is NaN everywhere")

    def averaged(self) -> AbstractContextManager[nn.Module]:
        return self.ema.applied_to(self.student)

    def weights(self) -> dict[str, Tensor]:
        return self.ema.average

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "student": self.student.state_dict(),
            "critic": self.critic.state_dict(),
            "ema": self.ema.state_dict(),
            "student_optimizer": self.student_optimization.state_dict(),
            "critic_optimizer": self.critic_optimization.state_dict(),
            "batches": self.batches.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.student.load_state_dict(state["student"])
        self.critic.load_state_dict(state["critic"])
        self.ema.load_state_dict(state["ema"])
        self.student_optimization.load_state_dict(state["student_optimizer"])
        self.critic_optimization.load_state_dict(state["critic_optimizer"])
        self.batches.load_state_dict(state["batches"])
