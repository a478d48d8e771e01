"""Exponential moving average of a module's parameters, with a constant or a power-function decay.

    constant:  θ̄ ← β θ̄ + (1 - β) θ
    power:     the same with β = (1 - 1/n)^(γ + 1) at update n. The weight of θ at update n is about
               n^γ, so the average covers a fixed fraction of the training so far (EDM2, 2312.02696
               §3)

The average is a dict of named tensors, sharded like the parameters, in float32 or float64. Each
rank averages its own shards. Buffers are not averaged.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rcm.distributed.sharding import reshard
from rcm.distributed.tensors import local_tensor
from rcm.validation import require_number

Decay = Callable[[int], float]
MIN_STD, MAX_STD = 1e-6, 12**-0.5  # of power_decay: the last update alone, and γ = 0


def constant_decay(beta: float) -> Decay:
    """β_n = β."""
    require_number("[)", 0, 1, beta=beta)
    return lambda n: beta


def power_decay(std: float) -> Decay:
    """β_n = (1 - 1/n)^(γ + 1), with γ from the relative standard deviation of the profile.

    std is in units of the training so far; 0.05 and 0.10 are common. Raises ValueError outside
    (MIN_STD, MAX_STD).
    """
    exponent = power_gamma(std) + 1
    return lambda n: (1 - 1 / n) ** exponent


def power_gamma(std: float) -> float:
    """γ ≥ 0 with (γ + 1) / ((γ + 2)² (γ + 3)) = std² (EDM2, 2312.02696)."""
    require_number("()", MIN_STD, MAX_STD, std=std)
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """A moving average of the weights, with a constant or a power-function decay."""

    decay: float | None = None
    """Decay β of every update."""
    std: float | None = None
    """Instead of decay: relative width of a power-function average; 0.05 and 0.1 are common."""

    def __post_init__(self) -> None:
        if self.decay is not None and self.std is not None:
            raise ValueError(f"std is {self.std}; it must be None where decay is {self.decay}")
        if self.std is not None:
            require_number("()", MIN_STD, MAX_STD, std=self.std)
        elif self.decay is not None:
            require_number("[)", 0, 1, decay=self.decay)
        else:
            raise ValueError("decay is None; it must be a number in [0, 1), unless std is given")

    def build(self, module: nn.Module) -> "EMA":
        """The average, starting as a copy of the module."""
        if self.std is not None:
            return EMA(module, power_decay(self.std))
        assert self.decay is not None
        return EMA(module, constant_decay(self.decay))


class EMA:
    """The moving average of a module.

    Call update(module) after each optimizer step. `with ema.applied_to(module):` samples or saves
    with the averaged weights. Both raise ValueError if names, shapes or shards of the parameters
    differ. The module may be sharded; what a forward pass gathered becomes shards again.
    """

    def __init__(self, module: nn.Module, decay: Decay) -> None:
        self.decay = decay
        self.updates = 0
        reshard(module)
        self.average = {name: _master(p).clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """θ̄ ← β θ̄ + (1 - β) θ."""
        self.updates += 1
        weight = 1 - self.decay(self.updates)
        for name, parameter in self._parameters(module).items():
            local_tensor(self.average[name]).lerp_(local_tensor(_master(parameter)), weight)

    def copy_to(self, module: nn.Module) -> None:
        """Give a module the averaged weights."""
        _copy(self.average, self._parameters(module))

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[nn.Module]:
        """Inside the block the module has the averaged weights; afterwards its own again."""
        parameters = self._parameters(module)
        own = {name: p.detach().clone() for name, p in parameters.items()}
        _copy(self.average, parameters)
        try:
            yield module
        finally:
            reshard(module)
            _copy(own, parameters)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, by the names of the parameters, and the number of updates."""
        return {"updates": torch.tensor(self.updates), **_prefixed(self.average)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless names and shapes equal those of this average."""
        average = {name: x for name, x in state.items() if name != "updates"}
        _require_same(_prefixed(self.average), average)
        self.updates = int(state["updates"])
        _copy(average, _prefixed(self.average))

    def _parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        reshard(module)
        parameters = dict(module.named_parameters())
        _require_same(self.average, parameters)
        return parameters


def _prefixed(average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"average.{name}": tensor for name, tensor in average.items()}


def _master(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Any]) -> None:
    for name, tensor in source.items():
        local_tensor(target[name]).copy_(local_tensor(tensor))


def _shards(tensor: Tensor) -> tuple[Any, ...] | None:
    """How a tensor is sharded; None if it is whole."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def _require_same(expected: dict[str, Tensor], given: dict[str, Any]) -> None:
    if missing := expected.keys() - given.keys():
        raise ValueError(f"parameters of the average are missing: {sorted(missing)}")
    if unknown := given.keys() - expected.keys():
        raise ValueError(f"parameters are not in the average: {sorted(unknown)}")
    for name, tensor in expected.items():
        if tensor.shape != given[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(given[name].shape)}, but in the average it has "
                f"{tuple(tensor.shape)}"
            )
        if _shards(tensor) != _shards(given[name]):
            raise ValueError(
                f"{name} has shards {_shards(given[name])}, but in the average it has "
                f"{_shards(tensor)}"
            )
