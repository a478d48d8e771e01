"""The two phases of a run: train a teacher on data, then distil it into a student with rCM.

A phase is a state that `step()` moves on by one iteration; `state_dict()` is all of it, so that a
restored phase takes the very same steps.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rcm.config import OptimizerConfig, RunConfig
from rcm.consistency import consistency_loss
from rcm.digits import CLASSES, Digits
from rcm.dit import DiT
from rcm.ema import EMA, constant_decay, power_decay
from rcm.errors import RunError
from rcm.losses import Loss, flow_matching_loss
from rcm.sampling import consistency_sample
from rcm.score import rollout_times, score_loss

Metrics = dict[str, float]


def build_network(config: RunConfig) -> DiT:
    """The network of every role, with weights drawn from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = config.model
        return DiT(dim=model.dim, depth=model.depth, heads=model.heads, classes=CLASSES)


class Batches:
    """Endless shuffled batches of (images, labels), and the generator of all a phase's noise."""

    def __init__(self, digits: Digits, batch: int, seed: int) -> None:
        if batch > len(digits.labels):
            raise RunError(f"a batch of {batch} is larger than the data ({len(digits.labels)})")
        self.digits, self.batch = digits, batch
        self.generator = Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)

    def next(self) -> tuple[Tensor, Tensor]:
        """Images (batch, 1, 8, 8) and labels (batch,)."""
        if len(self.order) < self.batch:
            self.order = torch.randperm(len(self.digits.labels), generator=self.generator)
        chosen, self.order = self.order[: self.batch], self.order[self.batch :]
        return self.digits.images[chosen], self.digits.labels[chosen]

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator)

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state(), "order": self.order.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])
        self.order = state["order"]


class Optimization:
    """AdamW on one network: warm-up, cosine decay, clipping, and no step on what is not finite."""

    def __init__(self, network: nn.Module, config: OptimizerConfig, iterations: int) -> None:
        self.network, self.config, self.iterations = network, config, iterations
        self.optimizer = torch.optim.AdamW(
            network.parameters(), config.lr, config.betas, weight_decay=config.weight_decay
        )

    def step(self, loss: Tensor, term: str, iteration: int) -> float:
        """One step on a scalar loss at iteration 0, 1, ...; returns the gradient's norm.

        Raises:
            RunError: the loss or its gradient is not finite; the weights are left as they were.
        """
        if not loss.isfinite():
            raise RunError(f"iteration {iteration + 1}: the {term} loss is {loss.item()}")
        rise = min(1.0, (iteration + 1) / max(1, self.config.warmup))
        lr = self.config.lr * rise * 0.5 * (1 + math.cos(math.pi * iteration / self.iterations))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        if not norm.isfinite():
            raise RunError(f"iteration {iteration + 1}: the {term} gradient is {norm.item()}")
        self.optimizer.step()
        return norm.item()


class TeacherPhase:
    """Flow matching on data; the averaged weights become the teacher."""

    name = "teacher"

    def __init__(self, config: RunConfig, digits: Digits) -> None:
        self.config = config.teacher
        self.iterations, self.iteration = self.config.iterations, 0
        self.network = build_network(config)
        self.ema = EMA(self.network, power_decay(self.config.ema_std))
        self.optimization = Optimization(self.network, self.config.optimizer, self.iterations)
        self.batches = Batches(digits, self.config.batch, seed=2 * config.seed)

    def step(self) -> Metrics:
        x0, labels = self.batches.next()
        t = self.config.times(len(x0), self.batches.generator)
        loss = flow_matching_loss(self.network, x0, self.batches.noise(x0), t, labels).value.mean()
        norm = self.optimization.step(loss, "flow matching", self.iteration)
        self.ema.update(self.network)
        self.iteration += 1
        return {"loss": loss.item(), "gradient": norm}

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights."""
        return self.ema.average

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimization.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimization.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["batches"])


class StudentPhase:
    """rCM: consistency along the teacher's ODE, regularised by distribution matching."""

    name = "student"

    def __init__(self, config: RunConfig, digits: Digits, teacher: DiT) -> None:
        self.config = config.student
        self.iterations, self.iteration = self.config.iterations, 0
        self.teacher = teacher.requires_grad_(False)
        self.student = copy.deepcopy(teacher).requires_grad_(True)
        self.critic = copy.deepcopy(teacher).requires_grad_(True)
        self.ema = EMA(self.student, constant_decay(self.config.ema))
        self.student_optimization = Optimization(
            self.student, self.config.optimizer, self.iterations
        )
        self.critic_optimization = Optimization(
            self.critic, self.config.critic_optimizer, self.iterations
        )
        self.batches = Batches(digits, self.config.batch, seed=2 * config.seed + 1)

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
        config, draw = self.config, self.batches.generator
        loss = consistency_loss(
            self.student,
            x0,
            self.batches.noise(x0),
            config.times(len(x0), draw),
            labels,
            teacher=self.teacher,
            warmup=min(1.0, self.iteration / max(1, config.tangent_warmup)),
            form=config.form,
            tangent_norm=config.tangent_norm,
            c=config.c,
        )
        self._require_finite_samples(loss, "nonfinite", "consistency")
        if regularised and config.score_weight > 0:
            score = score_loss(
                self._rollout(x0, labels),
                self.batches.noise(x0),
                config.score_times(len(x0), draw),
                labels,
                teacher=self.teacher,
                fake_score=self.critic,
            )
            self._require_finite_samples(score, "dmd_nonfinite", "score")
            loss = loss + config.score_weight * score
        norm = self.student_optimization.step(loss.value.mean(), "student", self.iteration)
        self.ema.update(self.student)
        means = {name: values.mean().item() for name, values in loss.diagnostics.items()}
        return {"loss": loss.value.mean().item(), "gradient": norm, **means}

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
        draw = self.batches.generator
        steps = int(torch.randint(1, self.config.rollout_steps + 1, (), generator=draw))
        times = rollout_times(steps, len(like), self.config.score_times, draw)
        return consistency_sample(self.student, self.batches.noise(like), times, labels, fresh=draw)

    def _require_finite_samples(self, loss: Loss, count: str, term: str) -> None:
        """A loss leaves out single samples that are not finite; all of them is another matter."""
        if bool((loss.diagnostics[count] == 1).all()):
            raise RunError(f"iteration {self.iteration + 1}: the {term} loss is NaN everywhere")

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights."""
        return self.ema.average

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "student": self.student.state_dict(),
            "critic": self.critic.state_dict(),
            "ema": self.ema.state_dict(),
            "student_optimizer": self.student_optimization.optimizer.state_dict(),
            "critic_optimizer": self.critic_optimization.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.student.load_state_dict(state["student"])
        self.critic.load_state_dict(state["critic"])
        self.ema.load_state_dict(state["ema"])
        self.student_optimization.optimizer.load_state_dict(state["student_optimizer"])
        self.critic_optimization.optimizer.load_state_dict(state["critic_optimizer"])
        self.batches.load_state_dict(state["batches"])
