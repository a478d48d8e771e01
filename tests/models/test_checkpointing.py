"""Unmodified networks of diffusers are checkpointed block by block inside of a jvp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.func import jvp
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointError

from jvp_attn import checkpoint_jvp, checkpoint_primal, replace_sdpa
from tests.jvp_attn.attention_cases import assert_close, randn
from tests.models.networks import Network, cosmos, dit, sd3, wan

Build = Callable[[], Network]

of_diffusers = pytest.mark.parametrize("build", [wan, cosmos, sd3, dit])


def derivatives(network: Network, through_tangent: bool = True) -> dict[str, Tensor]:
    """Output, tangent, and the gradients of both for inputs, tangents and all parameters.

    Without through_tangent the tangent is detached, as in distillation.
    """
    inputs = tuple(x.clone().requires_grad_() for x in network.inputs)
    tangents = tuple(randn(*x.shape, seed="tangent").requires_grad_() for x in inputs)
    with replace_sdpa():
        out, tangent = jvp(network, inputs, tangents)
    loss = (out * randn(*out.shape, seed="projection")).sum()
    if through_tangent:
        loss = loss + tangent.square().sum()
    else:
        loss = loss + (out * tangent.detach()).sum() / tangent.detach().norm()
    loss.backward()
    gradients = {name: x.grad for name, x in network.named_parameters() if x.grad is not None}
    places = {f"input {i}": x.grad for i, x in enumerate(inputs)}
    directions = {f"tangent {i}": x.grad for i, x in enumerate(tangents) if through_tangent}
    return {"out": out, "tangent": tangent, **gradients, **places, **directions}


@of_diffusers
def test_output_tangent_and_gradients_do_not_change(build: Build) -> None:
    network = build()
    network.module.enable_gradient_checkpointing(checkpoint_jvp)
    found, expected = derivatives(network), derivatives(build())
    assert len(expected) > len(list(network.parameters())) / 2
    assert_close(found, expected)


@of_diffusers
def test_checkpoint_primal_changes_no_value_and_no_gradient_through_the_output(
    build: Build,
) -> None:
    network = build()
    network.module.enable_gradient_checkpointing(checkpoint_primal)
    found, expected = (derivatives(n, through_tangent=False) for n in (network, build()))
    assert len(expected) > len(list(network.parameters())) / 2
    assert_close(found, expected)


@contextmanager
def recorded(saved: list[Tensor]) -> Iterator[None]:
    """Records the tensors that autograd saves."""

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield


@of_diffusers
@pytest.mark.parametrize("checkpoint", [checkpoint_jvp, checkpoint_primal])
def test_of_a_block_only_inputs_are_saved_and_tangents_for_gradients_through_them(
    checkpoint: Callable[..., Any], build: Build
) -> None:
    def shapes_and_bytes(tensors: list[Tensor]) -> tuple[list[Any], int]:
        return sorted(x.shape for x in tensors), sum(x.nbytes for x in tensors)

    blocks = []

    def check(block: nn.Module, *args: Any) -> Any:
        inputs = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        duals = [fwAD.unpack_dual(x) for x in inputs if x.is_floating_point()]
        tangents = [dual.tangent for dual in duals if dual.tangent is not None]
        checkpointed, kept = [], []
        with recorded(checkpointed):
            result = checkpoint(block, *args)
        with recorded(kept):
            block(*args)
        expected = [*inputs, *tangents] if checkpoint is checkpoint_jvp else inputs
        assert shapes_and_bytes(checkpointed) == shapes_and_bytes(expected)
        assert len(kept) > 5 * len(checkpointed)
        blocks.append(block)
        return result

    network = build()
    network.module.enable_gradient_checkpointing(check)
    with replace_sdpa():
        jvp(network, network.inputs, network.inputs)
    assert blocks


def test_torchs_checkpoint_raises() -> None:
    network = wan()
    network.module.enable_gradient_checkpointing()
    with pytest.raises(CheckpointError):
        derivatives(network)
