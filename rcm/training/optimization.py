"""AdamW with a learning-rate schedule, gradient clipping, and a rule for non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rcm.errors import RunError
from rcm.validation import require_choice, require_integer, require_number, require_numbers

MAX_LR = 100.0  # AdamW changes every weight by about lr in each step
FIRST_FACTOR = 1e-6  # of the constant schedule's warm-up, as in rCM's code

Schedule = Literal["cosine", "constant"]
Nonfinite = Literal["stop", "zero"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its learning-rate schedule and what it does with extreme gradients."""

    lr: float
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """After the warm-up: cosine decays to zero at the end of the run, constant does not."""
    warmup: int = 0
    """Updates of this network over which the learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip: float = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down to it. inf scales none."""
    nonfinite: Nonfinite = "stop"
    """Non-finite elements of the gradient stop the run, or become zero as in rCM's code."""

    def __post_init__(self) -> None:
        require_number("(]", 0, MAX_LR, lr=self.lr)
        require_choice(get_args(Schedule), schedule=self.schedule)
        require_integer(0, warmup=self.warmup)
        require_numbers(2, betas=self.betas)
        for i, beta in enumerate(self.betas):
            require_number("[)", 0, 1, **{f"betas[{i}]": beta})
        require_number("[)", 0, math.inf, weight_decay=self.weight_decay)
        require_number("(]", 0, math.inf, clip=self.clip)
        require_choice(get_args(Nonfinite), nonfinite=self.nonfinite)

    def factor(self, update: int, progress: float) -> float:
        """The learning rate of update 0, 1, ... of a network, divided by lr.

        progress is the fraction of the run that is done. The warm-up counts the network's own
        updates, because a critic may start late or be trained more often than the student.
        """
        if self.schedule == "constant":
            risen = min(1.0, update / self.warmup) if self.warmup else 1.0
            return FIRST_FACTOR + (1 - FIRST_FACTOR) * risen
        rise = min(1.0, (update + 1) / max(1, self.warmup))
        return rise * 0.5 * (1 + math.cos(math.pi * progress))


class Optimization:
    """The optimizer of one network."""

    def __init__(self, network: nn.Module, config: OptimizerConfig) -> None:
        self.network, self.config = network, config
        self.updates = 0
        self.optimizer = torch.optim.AdamW(
            network.parameters(), config.lr, config.betas, weight_decay=config.weight_decay
        )

    def step(
        self, terms: dict[str, Tensor], *, iteration: int, iterations: int
    ) -> dict[str, float]:
        """Minimise the sum of scalar losses, by name, in iteration 0, 1, ... of a run.

        Returns metrics: "grad_norm" before clipping; "clipped", 1 if clipping acted;
        "nonfinite_grads", the number of elements set to zero; with several terms also
        "grad_norm_NAME" of each, over its finite elements, and "grad_ratio_NAME", its ratio to the
        first. Terms share no graph: each has its own backward pass.

        Raises:
            RunError: a loss or the gradient is not finite; the weights are unchanged.
        """
        for name, loss in terms.items():
            if not loss.isfinite():
                raise RunError(f"iteration {iteration + 1}: the {name} loss is {loss.item()}")
        factor = self.config.factor(self.updates, iteration / iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor
        self.optimizer.zero_grad()
        metrics = self._backward(terms)
        metrics |= self._clip(" + ".join(terms), iteration)
        self.optimizer.step()
        self.updates += 1
        return metrics

    def _backward(self, terms: dict[str, Tensor]) -> dict[str, float]:
        if len(terms) == 1:
            next(iter(terms.values())).backward()
            return {}
        parameters, norms = self._parameters(), {}
        for name, loss in terms.items():
            before = [None if p.grad is None else p.grad.clone() for p in parameters]
            loss.backward()
            norms[name] = _finite_norm(
                p.grad if old is None else p.grad - old
                for p, old in zip(parameters, before, strict=True)
                if p.grad is not None
            )
        first = next(iter(norms.values()))
        metrics = {f"grad_norm_{name}": norm for name, norm in norms.items()}
        others = list(norms.items())[1:]
        return metrics | {f"grad_ratio_{n}": norm / max(first, 1e-30) for n, norm in others}

    def _clip(self, terms: str, iteration: int) -> dict[str, float]:
        zeroed = 0
        if self.config.nonfinite == "zero":
            gradients = [p.grad for p in self._parameters() if p.grad is not None]
            zeroed = int(sum((~gradient.isfinite()).sum() for gradient in gradients))
            for gradient in gradients:
                gradient.nan_to_num_(0.0, 0.0, 0.0)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), self.config.clip)
        if not norm.isfinite():
            raise RunError(f"iteration {iteration + 1}: the {terms} gradient is {norm.item()}")
        return {
            "grad_norm": norm.item(),
            "clipped": float(norm.item() > self.config.clip),
            "nonfinite_grads": float(zeroed),
        }

    def _parameters(self) -> list[nn.Parameter]:
        return list(self.network.parameters())

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "adamw": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self.optimizer.load_state_dict(state["adamw"])


def _finite_norm(tensors: Iterable[Tensor]) -> float:
    """Norm of all finite elements."""
    norms = [torch.linalg.vector_norm(x.nan_to_num(0.0, 0.0, 0.0)) for x in tensors]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
