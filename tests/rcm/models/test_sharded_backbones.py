"""Transformers of diffusers with FSDP2's mixed precision, on one rank."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from jvp_attn import checkpoint_jvp, checkpoint_primal
from rcm.distributed.sharding import shard
from rcm.distributed.tensors import full_tensor
from rcm.models.backbone import Backbone
from rcm.models.diffusers import Architecture
from rcm.time_precision import require_unrounded_time
from tests.rcm.models.backbones import ARCHITECTURES, example, tiny_backbone

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(architecture: Architecture, *, cast_forward_inputs: bool = False) -> Backbone:
    """float32 weights that are gathered in bfloat16."""
    net = tiny_backbone(architecture)
    net.dtype = torch.bfloat16
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        cast_forward_inputs=cast_forward_inputs,
    )
    mesh = init_device_mesh("cpu", (1,))
    for module in (*(block for blocks in net.blocks for block in blocks), net.model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return net


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_output_jvp_and_gradients_are_near_those_of_float32(architecture: Architecture) -> None:
    x, t, condition = example(architecture)
    tangents = (torch.randn_like(x), torch.tensor([0.5, -0.5]))
    results = []
    for net in (tiny_backbone(architecture), sharded(architecture)):
        f, tangent = torch.func.jvp(lambda x, t, net=net: net(x, t, condition), (x, t), tangents)
        net(x, t, condition).square().sum().backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        full = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
        results.append([f, tangent, torch.cat([g.flatten() for g in full])])
    for exact, mixed in zip(*results, strict=True):
        assert mixed.dtype == torch.float32
        assert (mixed - exact).norm() < 0.05 * exact.norm()
    require_unrounded_time(net, x, t, condition)


@pytest.mark.parametrize("architecture", ["wan", "cosmos", "sd3"])
def test_the_cast_of_inputs_that_fsdp2_does_by_default_raises(architecture: Architecture) -> None:
    net = sharded(architecture, cast_forward_inputs=True)
    with pytest.raises(ValueError, match=r"time has dtype torch\.bfloat16.*cast_forward_inputs"):
        net(*example(architecture))


def gradients_of_two_passes(net: Backbone, kinds: tuple[str, str]) -> dict[str, Tensor]:
    """Of the sum of a loss for each pass, in one backward pass."""
    x, t, condition = example("wan")
    losses = []
    for scale, kind in enumerate(kinds, start=1):
        f, tangent = net(scale * x, t, condition), torch.zeros_like(x)
        if kind == "jvp":
            f, tangent = torch.func.jvp(
                lambda x, t: net(x, t, condition), (scale * x, t), (x.cos(), torch.ones_like(t))
            )
        losses.append((f - f.detach() + 1 + tangent.detach()).square().mean())
    torch.stack(losses).sum().backward()
    named = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {name: full_tensor(gradient) for name, gradient in named.items()}


@pytest.mark.parametrize("kinds", [("jvp", "jvp"), ("jvp", "plain"), ("plain", "jvp")])
@pytest.mark.parametrize("checkpoint", [checkpoint_primal, checkpoint_jvp])
def test_two_passes_with_checkpoints_may_share_a_backward_pass(
    kinds: tuple[str, str], checkpoint: Callable[..., Any]
) -> None:
    expected = gradients_of_two_passes(tiny_backbone("wan"), kinds)
    net = tiny_backbone("wan")
    blocks = [block for blocks in net.blocks for block in blocks]
    shard(net.model, blocks, init_device_mesh("cpu", (1,)), data_size=1)
    net.enable_gradient_checkpointing(checkpoint)
    found = gradients_of_two_passes(net, kinds)
    assert found.keys() == expected.keys()
    largest = max(x.norm() for x in expected.values())
    for name, x in expected.items():
        # The gradient of a key's bias is zero but for rounding.
        assert (found[name] - x).norm() <= 1e-6 * x.norm() + 1e-8 * largest, name
