"""Transformers of diffusers with FSDP2's mixed precision, on one rank."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

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
