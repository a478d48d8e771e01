"""AdamW with warm-up, cosine decay and gradient clipping; it refuses non-finite steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rcm.errors import RunError
from rcm.validation import require_integer, require_number, require_numbers

MAX_LR = 100.0  # AdamW changes every weight by about lr in each step


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay to zero."""

    lr: float
    """Peak learning rate."""
    warmup: int = 0
    """Iterations of the linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip: float = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down to it. inf scales none."""

    def __post_init__(self) -> None:
        require_number("(]", 0, MAX_LR, lr=self.lr)
        require_integer(0, warmup=self.warmup)
        require_numbers(2, betas=self.betas)
        for i, beta in enumerate(self.betas):
            require_number("[)", 0, 1, **{f"betas[{i}]": beta})
        require_number("[)", 0, math.inf, weight_decay=self.weight_decay)
        require_number("(]", 0, math.inf, clip=self.clip)


class Optimization:
    """The optimizer of one network over a known number of iterations."""

    def __init__(self, network: nn.Module, config: OptimizerConfig, iterations: int) -> None:
        self.network, self.config, self.iterations = network, config, iterations
        self.optimizer = torch.optim.AdamW(
            network.parameters(), config.lr, config.betas, weight_decay=config.weight_decay
        )

    def step(self, loss: Tensor, term: str, iteration: int) -> float:
        """Take one step on a scalar loss at iteration 0, 1, ...; return the gradient's norm.

        Raises:
            RunError: the loss or its gradient is not finite; the weights are unchanged.
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

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
