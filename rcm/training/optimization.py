"""AdamW with a learning-rate schedule, gradient clipping, and a rule for non-finite gradients.

All decisions follow from numbers that every rank computes alike, so that ranks never disagree about
taking a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rcm.distributed.layout import Layout
from rcm.distributed.sharding import reshard
from rcm.distributed.tensors import full_tensor, local_tensor
from rcm.errors import RunError
from rcm.validation import require_choice, require_integer, require_number, require_numbers

MAX_LR = 100.0  # AdamW changes every weight by about lr in each step
FIRST_FACTOR = 1e-6  # of the constant schedule's warm-up, as in rCM's code

Schedule = Literal["cosine", "constant"]
Nonfinite = Literal["stop", "skip", "zero"]


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
    """A non-finite loss or gradient stops the run or skips the update; or, as in rCM's code,
    non-finite elements of the gradient become zero, and only a non-finite loss skips the update."""
    max_skips: int = 10
    """The run stops after more skipped updates in a row."""

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
        require_integer(0, max_skips=self.max_skips)

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
    """The optimizer of one network; the network may be sharded by FSDP2.

    An update is zero_grad(), the forward passes, backward(...) of each micro-batch, then step(...).
    """

    def __init__(
        self, network: nn.Module, config: OptimizerConfig, layout: Layout | None = None
    ) -> None:
        self.config, self.layout = config, layout or Layout()
        self.updates = 0
        self.skipped_in_a_row = 0
        reshard(network)  # gathered parameters are other tensors, which get no gradient
        self.names = [name for name, _ in network.named_parameters()]
        self.parameters = list(network.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            config.lr,
            config.betas,
            weight_decay=config.weight_decay,
            fused=all(_is_on_cpu(parameter) for parameter in self.parameters) or None,
        )
        for parameter in self.parameters:  # as AdamW makes it, early, so that it can be loaded
            self.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
        self.term_norms: dict[str, float] = {}

    def zero_grad(self) -> None:
        """Start an update, before the forward pass."""
        self.optimizer.zero_grad()
        self.term_norms = {}

    def backward(self, terms: dict[str, Tensor], *, compare: bool = True) -> None:
        """Add the gradient of a micro-batch: scalar losses by name, each with its own graph.

        compare says whether to measure the gradient of each of several losses, which takes a
        backward pass for each; the norms of those of micro-batches do not add up.
        """
        if not compare or len(terms) == 1:
            _backward(reduce(torch.add, terms.values()))
            return
        for name, loss in terms.items():
            before = [None if g is None else g.clone() for g in self._local_gradients()]
            _backward(loss)
            self.term_norms[name] = self._norm_of_change(before)

    def step(self, names: str, *, progress: float, problem: str | None = None) -> dict[str, float]:
        """Take the step, unless there is a problem; progress is the fraction of the run done.

        names is that of the losses, for messages; problem says what is not finite among them.

        Returns metrics: "grad_norm" before clipping; "clipped", 1 if clipping acted;
        "nonfinite_grads", the number of elements set to zero; "skipped", the number of updates
        skipped in a row, if this one was. With several losses that were compared also
        "grad_norm_NAME" of each, over its finite elements, and "grad_ratio_NAME", its ratio to the
        first.

        Raises:
            RunError: the losses or the gradient are not finite, and the config says to stop. The
                weights are unchanged.
        """
        zeroed = self._zero_nonfinite() if self.config.nonfinite == "zero" else 0
        norm = self._norm()
        if problem is None and not math.isfinite(norm):
            problem = f"the {names} gradient is {norm}"
        metrics = {"grad_norm": norm, "clipped": float(norm > self.config.clip)}
        metrics |= {"nonfinite_grads": float(zeroed), **self._term_metrics()}
        if problem is not None:
            self.skipped_in_a_row += 1
            if self.config.nonfinite == "stop":
                raise RunError(problem)
            if self.skipped_in_a_row > self.config.max_skips:
                raise RunError(f"{problem}, and so were {self.config.max_skips} updates before")
            return {**metrics, "skipped": float(self.skipped_in_a_row)}
        self.skipped_in_a_row = 0
        if self.config.clip < math.inf:
            total = torch.tensor(norm, device=self.parameters[0].device)
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self.config.factor(self.updates, progress)
        self.optimizer.step()
        self.updates += 1
        return metrics

    def _local_gradients(self) -> list[Tensor | None]:
        """This rank's part of each gradient."""
        gradients = [parameter.grad for parameter in self.parameters]
        return [None if gradient is None else local_tensor(gradient) for gradient in gradients]

    def _norm(self) -> float:
        """The same on every rank, whatever the order in which each copy adds its shards."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = full_tensor(nn.utils.get_total_norm(gradients))
        return self.layout.mean(norm.double().cpu()).item()

    def _norm_of_change(self, before: list[Tensor | None]) -> float:
        """Norm of the finite elements of what was added to the gradient."""
        squares = torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)
        for gradient, old in zip(self._local_gradients(), before, strict=True):
            if gradient is not None:
                change = gradient if old is None else gradient - old
                squares += change.nan_to_num(0.0, 0.0, 0.0).double().square().sum()
        return self.layout.shard_sum(squares).sqrt().item()

    def _zero_nonfinite(self) -> int:
        zeroed = torch.zeros((), dtype=torch.int64, device=self.parameters[0].device)
        for gradient in self._local_gradients():
            if gradient is not None:
                zeroed += (~gradient.isfinite()).sum()
                gradient.nan_to_num_(0.0, 0.0, 0.0)
        return int(self.layout.shard_sum(zeroed))

    def _term_metrics(self) -> dict[str, float]:
        metrics = {f"grad_norm_{name}": norm for name, norm in self.term_norms.items()}
        if not metrics:
            return metrics
        first, *others = self.term_norms.items()
        ratios = {f"grad_ratio_{name}": norm / max(first[1], 1e-30) for name, norm in others}
        return metrics | ratios

    def state_dict(self) -> dict[str, Tensor]:
        """The moments, which load in place, and counters, which load_state_dict reads back."""
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        counters = torch.tensor([self.updates, self.skipped_in_a_row])
        steps = torch.stack([state["step"] for state in states])
        moments = {
            f"{moment}.{name}": state[moment]
            for moment in ("exp_avg", "exp_avg_sq")
            for name, state in zip(self.names, states, strict=True)
        }
        return {"counters": counters, "steps": steps, **moments}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.updates, self.skipped_in_a_row = state["counters"].tolist()
        for parameter, step in zip(self.parameters, state["steps"], strict=True):
            self.optimizer.state[parameter]["step"].copy_(step)
        for name, tensor in self.state_dict().items():
            if name not in ("counters", "steps") and tensor is not state[name]:
                tensor.copy_(state[name])


def _is_on_cpu(parameter: Tensor) -> bool:
    """Whether it is a whole tensor on the CPU, where the fused AdamW takes a third of the time."""
    return parameter.device.type == "cpu" and not isinstance(parameter, DTensor)


def _backward(loss: Tensor) -> None:
    """loss.backward(), which leaves nothing behind if it fails.

    What a failed pass leaves in the queue of autograd may have hooks in Python, as in checkpoints.
    PyTorch 2.15 destroys it after Python has ended and crashes, which hides the exit code.
    """
    try:
        loss.backward()
    except BaseException:
        torch.ones((), requires_grad=True).backward()  # empties the queue of this thread
        raise
