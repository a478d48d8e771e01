"""A one-pass step of a compiled network on shards, and the same step of one process."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from jvp_attn import checkpoint_primal
from rcm.distributed.sharding import shard
from rcm.models.backbone import Backbone
from rcm.models.compiled_blocks import compile_blocks
from tests.distributed.sharding_cases import Named, gradients
from tests.rcm.models.backbones import BATCH, example, tiny_backbone


def network() -> Backbone:
    built = tiny_backbone("wan")
    built.enable_gradient_checkpointing(checkpoint_primal)
    return built


def blocks_of(backbone: Backbone) -> list[nn.Module]:
    return [block for blocks in backbone.blocks for block in blocks]


def compiled_step(rank: int) -> Named:
    """The second step of a rank, on one sample."""
    net = network()
    compile_blocks(blocks_of(net), "aot_eager")
    mesh = init_device_mesh("cpu", (BATCH,))
    shard(net.model, blocks_of(net), mesh, data_size=BATCH)
    step(net, slice(rank, rank + 1))
    return step(net, slice(rank, rank + 1))


def step(net: Backbone, samples: slice) -> Named:
    """F, its derivative, and the gradients of the mean loss of some samples."""
    x, t, condition = example("wan")
    x, t = x[samples], t[samples]
    condition = {name: value[samples] for name, value in condition.items()}

    def f_of(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t, condition)

    net.zero_grad()
    f, derivative = torch.func.jvp(f_of, (x, t), (x.cos(), torch.ones_like(t)))
    (f - f.detach() + derivative.detach()).square().mean().backward()
    return {"F": f.detach(), "derivative": derivative.detach(), **gradients(net.model)}
