"""Training in progress: the networks, optimizers, averages and data of one method.

One step asks the method for its losses, one network at a time. After each it takes an optimizer
step on that network and updates the averages of it, so that the next loss sees the new weights.
Every rank does the same with its own samples; one process is a single rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rcm.data.dataset import Data
from rcm.distributed.agreement import errors_on_every_rank
from rcm.distributed.layout import Layout
from rcm.distributed.sharding import accumulating_gradients, reset_iteration, reshard
from rcm.distributed.tensors import full_tensor, local_tensor
from rcm.errors import RunError
from rcm.time_precision import require_unrounded_time
from rcm.training.batches import Batches
from rcm.training.ema import EMA
from rcm.training.method import Averaged, Losses, Method, Role, Step, Trained
from rcm.training.optimization import Optimization

Metrics = dict[str, float]
Weights = dict[str, Tensor]


def build_networks(
    roles: Mapping[str, Role], make: Callable[[str], nn.Module]
) -> dict[str, nn.Module]:
    """A network for every role.

    make(start) makes one with the weights of a start: "teacher", "scratch" or the folder of a run.
    Each is made anew, because a sharded network cannot be copied.
    """
    networks = {}
    for name, role in roles.items():
        start = roles[role.of].start if isinstance(role, Averaged) else role.start  # type: ignore[union-attr]
        networks[name] = make(start).requires_grad_(isinstance(role, Trained))
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


class Trainer:
    """Trains the networks of a method. A restored trainer takes the same steps.

    Raises OptionError if the mesh does not divide the batch, RunError if a network rounds its time
    below float32.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        networks: Mapping[str, nn.Module],
        data: Data,
        *,
        seed: int,
        layout: Layout | None = None,
        accumulation: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self.method, self.networks = name, method, networks
        self.layout = layout or Layout()
        self.iteration = 0
        self.batches = Batches(data, method.batch, seed, torch.device(device))
        self.positions = self.layout.positions(method.batch, accumulation)
        self._require_unrounded_time()
        self.optimizations: dict[str, Optimization] = {}
        self.averages: dict[str, EMA] = {}
        self.followers: dict[str, list[str]] = {}
        for role, kind in method.roles().items():
            if isinstance(kind, Trained):
                self.optimizations[role] = Optimization(networks[role], kind.optimizer, self.layout)
                source = role
            elif isinstance(kind, Averaged):
                source = kind.of
            else:
                continue
            if kind.ema is not None:
                self.averages[role] = kind.ema.build(networks[source])
                self.followers.setdefault(source, []).append(role)

    def _require_unrounded_time(self) -> None:
        batch = self.batches.read(0, self.positions[0][:1])
        t = torch.ones(1, device=batch.x0.device)
        for role, network in self.networks.items():
            try:
                require_unrounded_time(network, batch.x0, t, batch.condition)
            except ValueError as error:
                raise RunError(f"the {role} cannot be used: {error}") from error

    @property
    def iterations(self) -> int:
        return self.method.iterations

    def step(self) -> Metrics:
        """Do one iteration; return the metrics of every network that it trained.

        Raises:
            RunError: a loss or a gradient is not finite and the optimizer is to stop then, or the
                method lacks a role.
        """
        metrics: Metrics = {}
        updates = {role: o.updates for role, o in self.optimizations.items()}
        with errors_on_every_rank():  # one rank may read a bad sample
            batches = [self.batches.read(self.iteration, part) for part in self.positions]
        runs = [
            self.method.losses(Step(self.iteration, batch, self.networks, updates))
            for batch in batches
        ]
        while (gradient := self._backward(runs)) is not None:
            metrics |= self._update(gradient)
        for network in self.networks.values():
            reset_iteration(network)
        self.iteration += 1
        return metrics

    def _backward(self, runs: list[Losses]) -> Gradient | None:
        """Accumulate the gradient of the next network over all micro-batches; None at the end."""
        role = ""
        parts: list[dict[tuple[str, str], Tensor]] = []
        for number, losses in enumerate(runs, start=1):
            is_last = number == len(runs)
            update = next(losses, None)
            if update is None:
                return None
            role, terms = update
            if role not in self.optimizations:
                raise RunError(
                    f"the method has a loss for {role!r}, but trains only "
                    f"{', '.join(self.optimizations)}"
                )
            means = {name: term.value.mean() for name, term in terms.items()}
            with nullcontext() if is_last else accumulating_gradients(self.networks[role]):
                self.optimizations[role].backward(
                    {name: mean / len(runs) for name, mean in means.items()},
                    measure=len(runs) == 1,
                )
            part = {("loss", name): mean.detach() for name, mean in means.items()}
            for name, term in terms.items():
                part |= {(name, kind): x.mean() for kind, x in term.diagnostics.items()}
            parts.append(part)
        return Gradient(role, self._means(parts))

    def _means(self, parts: list[dict[tuple[str, str], Tensor]]) -> dict[tuple[str, str], float]:
        """The mean over the micro-batches of all ranks; one message for all names."""
        rows = [torch.stack([v.double() for v in part.values()]) for part in parts]
        means = self.layout.mean(torch.stack(rows).mean(0).cpu()).tolist()
        return dict(zip(parts[0], means, strict=True))

    def _update(self, gradient: Gradient) -> Metrics:
        role = gradient.role
        reshard(self.networks[role])
        try:
            metrics = self.optimizations[role].step(
                " + ".join(gradient.losses),
                progress=self.iteration / self.iterations,
                problem=gradient.problem,
            )
        except RunError as error:
            raise RunError(f"iteration {self.iteration + 1}: {error}") from error
        self.optimizations[role].zero_grad()  # its memory is free for the other networks
        if "skipped" not in metrics:
            for follower in self.followers.get(role, ()):
                self.averages[follower].update(self.networks[role])
                if follower != role:
                    self.averages[follower].copy_to(self.networks[follower])
        metrics = {"loss": sum(gradient.losses.values()), **metrics, **gradient.diagnostics}
        prefix = "" if role == self.method.result else f"{role}_"
        return {f"{prefix}{name}": value for name, value in metrics.items()}

    @property
    def network(self) -> nn.Module:
        """The network that becomes the result, with its own weights."""
        return self.networks[self.method.result]

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """Inside, the network with its averaged weights."""
        return self.averages[self.method.result].applied_to(self.network)

    def weights(self) -> Weights:
        """The averaged weights and the buffers of the result, complete on every rank."""
        found = {**self.network.state_dict(), **self.averages[self.method.result].average}
        return {name: full_tensor(tensor) for name, tensor in found.items()}

    def has_finite_weights(self) -> bool:
        """Whether all averaged weights are finite, on every rank."""
        average = self.averages[self.method.result].average.values()
        return self.layout.all(all(bool(local_tensor(w).isfinite().all()) for w in average))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on. Weights, averages and moments are no copies."""
        for network in self.networks.values():
            reshard(network)
        counters = {"iteration": self.iteration, "samples": len(self.batches.data)}
        state = {name: torch.tensor(value) for name, value in counters.items()}
        for role, optimization in self.optimizations.items():
            state |= _prefixed(f"networks.{role}", self.networks[role].state_dict())
            state |= _prefixed(f"optimizers.{role}", optimization.state_dict())
        for role, ema in self.averages.items():
            state |= _prefixed(f"averages.{role}", ema.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a state; `state` may be that of this trainer, overwritten in place.

        Raises RunError if the data had another number of samples.
        """
        samples, before = len(self.batches.data), int(state["samples"])
        if samples != before:
            raise RunError(
                f"the data have {samples} samples now, and had {before} when the run started; "
                "restore them, or start another run"
            )
        self.iteration = int(state["iteration"])
        for role, optimization in self.optimizations.items():
            self.networks[role].load_state_dict(_of(f"networks.{role}", state))
            optimization.load_state_dict(_of(f"optimizers.{role}", state))
        for role, ema in self.averages.items():
            ema.load_state_dict(_of(f"averages.{role}", state))
            if role not in self.optimizations:
                ema.copy_to(self.networks[role])


@dataclass(frozen=True)
class Gradient:
    """An accumulated gradient: of which role, and the means over all samples of what it is of."""

    role: str
    means: dict[tuple[str, str], float]
    """By ("loss", its name), and by (name of a loss, name of its diagnostic)."""

    @property
    def losses(self) -> dict[str, float]:
        return {name: mean for (kind, name), mean in self.means.items() if kind == "loss"}

    @property
    def diagnostics(self) -> dict[str, float]:
        return {name: mean for (kind, name), mean in self.means.items() if kind != "loss"}

    @property
    def problem(self) -> str | None:
        """What is not finite; a loss masks single non-finite samples by itself."""
        for (kind, name), mean in self.means.items():
            if name.endswith("nonfinite") and kind != "loss" and mean == 1:
                return f"the {kind} loss is NaN everywhere"
        for name, loss in self.losses.items():
            if not math.isfinite(loss):
                return f"the {name} loss is {loss}"
        return None


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _of(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    start = f"{prefix}."
    return {n.removeprefix(start): x for n, x in state.items() if n.startswith(start)}
