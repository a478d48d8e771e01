"""A network of diffusers whose timestep is cast to the model's dtype is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rcm.network_conversions import from_rectified_flow
from rcm.time_precision import guard_time, require_unrounded_time
from rcm.trigflow import Network
from tests.models.networks import cosmos, dit, sd3, wan

T = torch.tensor([0.3, 1.4])


def adapter(module: torch.nn.Module, timestep_dtype: torch.dtype) -> Network:
    """A bfloat16 Wan as a TrigFlow network: rectified flow with time 1000 u."""

    def net(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        text = condition.to(torch.bfloat16)
        return module(x.bfloat16(), t.to(timestep_dtype), text, return_dict=False)[0]

    return from_rectified_flow(net, time_scale=1000)


@pytest.fixture
def network() -> torch.nn.Module:
    return wan().module.bfloat16().requires_grad_(False)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 1, 8, 8), T, torch.randn(2, 5, 16)


def test_wan_with_a_bfloat16_timestep_is_refused_by_the_check(
    network: torch.nn.Module, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    with pytest.raises(ValueError, match=r"rounds its time to torch.bfloat16 in .*, line \d+;"):
        require_unrounded_time(adapter(network, torch.bfloat16), *inputs)


def test_wan_with_a_bfloat16_timestep_is_refused_by_the_guard(
    network: torch.nn.Module, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    guard_time(network)
    with pytest.raises(ValueError, match=r"time has dtype torch.bfloat16; allowed are float32"):
        adapter(network, torch.bfloat16)(*inputs)


def test_wan_in_bfloat16_with_a_float32_timestep_is_accepted(
    network: torch.nn.Module, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    guard_time(network)
    require_unrounded_time(adapter(network, torch.float32), *inputs)


def test_the_two_differ_at_the_last_step_of_a_sampler(
    network: torch.nn.Module, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    """bfloat16 moves 1000 u = 609.0 to 608: the outputs are those of another time."""
    x, _, text = inputs
    t = torch.full((2,), 1.0)
    precise, rounded = (adapter(network, d)(x, t, text) for d in (torch.float32, torch.bfloat16))
    assert not torch.equal(precise, rounded)


@pytest.mark.parametrize("build", [wan, cosmos, sd3, dit])
def test_the_embeddings_of_every_network_are_found(build: object) -> None:
    assert guard_time(build().module)  # type: ignore[operator]


@pytest.mark.parametrize("build", [wan, cosmos, sd3, dit])
def test_networks_with_a_precise_timestep_are_accepted(build: object) -> None:
    """In float64, and in bfloat16."""
    network = build()  # type: ignore[operator]
    x, t = network.inputs

    def net(x: Tensor, t: Tensor, condition: object) -> Tensor:
        return network(x, t)

    require_unrounded_time(net, x, t / 1000, None)
    network.bfloat16()
    require_unrounded_time(net, x.bfloat16(), t / 1000, None)
