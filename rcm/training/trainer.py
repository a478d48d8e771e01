"""Training in progress: the networks, optimizers, averages and data of one method.

One step asks the method for its losses, one network at a time. After each it takes an optimizer
step on that network and updates the averages of it, so that the next loss sees the new weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from rcm.data.dataset import Dataset
from rcm.errors import RunError
from rcm.losses.loss import Loss
from rcm.time_precision import require_unrounded_time
from rcm.training.batches import Batches
from rcm.training.ema import EMA
from rcm.training.method import SCRATCH, Averaged, Method, Role, Step, Trained
from rcm.training.optimization import Optimization

Metrics = dict[str, float]
Weights = dict[str, Tensor]


def build_networks(
    roles: Mapping[str, Role], build: Callable[[], nn.Module], weights: Mapping[str, Weights]
) -> dict[str, nn.Module]:
    """A network for every role, each with the weights that the role starts from.

    build makes a network with new weights; weights has those of every other start by its name.
    Networks are loaded instead of copied, because a sharded network cannot be copied.

    Raises:
        RunError: weights are missing, or do not fit the network.
    """
    networks = {}
    for name, role in roles.items():
        start = roles[role.of].start if isinstance(role, Averaged) else role.start  # type: ignore[union-attr]
        networks[name] = build()
        if start != SCRATCH:
            if start not in weights:
                raise RunError(f"the {name} starts from {start!r}, but there are no such weights")
            load_into(networks[name], weights[start], f"the weights of {start}")
        networks[name].requires_grad_(isinstance(role, Trained))
    return networks


def load_into(network: nn.Module, weights: Weights, source: str) -> None:
    """Load a state dict.

    Raises:
        RunError: names or shapes differ; the message names the first ones.
    """
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise RunError(f"{source} do not fit the model: {problem[:300]}") from error


def _require_unrounded_time(role: str, network: nn.Module, data: Dataset) -> None:
    x, condition = data.samples[:1], data.labels[:1]
    t = torch.ones(1, device=x.device)
    try:
        require_unrounded_time(network, x, t, condition)
    except ValueError as error:
        raise RunError(f"the {role} cannot be used: {error}") from error


class Trainer:
    """Trains the networks of a method. A restored trainer takes the same steps.

    Raises RunError if a network rounds its time below float32.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        networks: Mapping[str, nn.Module],
        data: Dataset,
        *,
        seed: int,
    ) -> None:
        for role, network in networks.items():
            _require_unrounded_time(role, network, data)
        self.name, self.method, self.networks = name, method, networks
        self.iteration = 0
        self.batches = Batches(data, method.batch, seed)
        self.optimizations: dict[str, Optimization] = {}
        self.averages: dict[str, EMA] = {}
        self.followers: dict[str, list[str]] = {}
        for role, kind in method.roles().items():
            if isinstance(kind, Trained):
                self.optimizations[role] = Optimization(networks[role], kind.optimizer)
                source = role
            elif isinstance(kind, Averaged):
                source = kind.of
            else:
                continue
            if kind.ema is not None:
                self.averages[role] = kind.ema.build(networks[source])
                self.followers.setdefault(source, []).append(role)

    @property
    def iterations(self) -> int:
        return self.method.iterations

    def step(self) -> Metrics:
        """Do one iteration; return the metrics of every network that it trained.

        Raises:
            RunError: a loss or a gradient is not finite, or the method lacks a role.
        """
        metrics: Metrics = {}
        updates = {role: o.updates for role, o in self.optimizations.items()}
        step = Step(self.iteration, self.batches, self.networks, updates)
        for role, terms in self.method.losses(step):
            if role not in self.optimizations:
                raise RunError(
                    f"the method has a loss for {role!r}, but trains only "
                    f"{', '.join(self.optimizations)}"
                )
            metrics |= self._update(role, terms)
        self.iteration += 1
        return metrics

    def _update(self, role: str, terms: dict[str, Loss]) -> Metrics:
        for name, term in terms.items():
            self._require_a_finite_sample(name, term)
        means = {name: term.value.mean() for name, term in terms.items()}
        metrics = {"loss": sum(mean.item() for mean in means.values())}
        metrics |= self.optimizations[role].step(
            means, iteration=self.iteration, iterations=self.iterations
        )
        for follower in self.followers.get(role, ()):
            self.averages[follower].update(self.networks[role])
            if follower != role:
                self.averages[follower].copy_to(self.networks[follower])
        for term in terms.values():
            metrics |= {name: values.mean().item() for name, values in term.diagnostics.items()}
        prefix = "" if role == self.method.result else f"{role}_"
        return {f"{prefix}{name}": value for name, value in metrics.items()}

    def _require_a_finite_sample(self, name: str, term: Loss) -> None:
        """Stop if no sample is finite; a loss masks single non-finite samples by itself."""
        for count, values in term.diagnostics.items():
            if count.endswith("nonfinite") and bool((values == 1).all()):
                raise RunError(f"iteration {self.iteration + 1}: the {name} loss is NaN everywhere")

    @property
    def network(self) -> nn.Module:
        """The network that becomes the result, with its own weights."""
        return self.networks[self.method.result]

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """Inside, the network with its averaged weights."""
        return self.averages[self.method.result].applied_to(self.network)

    def weights(self) -> Weights:
        """The averaged weights and the buffers of the result."""
        return {**self.network.state_dict(), **self.averages[self.method.result].average}

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "networks": {role: self.networks[role].state_dict() for role in self.optimizations},
            "averages": {role: ema.state_dict() for role, ema in self.averages.items()},
            "optimizers": {role: o.state_dict() for role, o in self.optimizations.items()},
            "batches": self.batches.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        for role, optimization in self.optimizations.items():
            self.networks[role].load_state_dict(state["networks"][role])
            optimization.load_state_dict(state["optimizers"][role])
        for role, ema in self.averages.items():
            ema.load_state_dict(state["averages"][role])
            if role not in self.optimizations:
                ema.copy_to(self.networks[role])
        self.batches.load_state_dict(state["batches"])
