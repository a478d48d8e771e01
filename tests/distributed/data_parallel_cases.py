"""Derivatives of a transformer on each rank of data-parallel training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import jvp
from torch.nn.parallel import DistributedDataParallel

from jvp_attn import checkpoint_jvp, checkpoint_primal, flash_attn_jvp, replace_sdpa

RANKS = 2
BATCH, SEQLEN, WIDTH, HEADS = 2 * RANKS, 5, 8, 2

Named = dict[str, Tensor]
# The derivative of a model at x in direction tx.
Derivative = Callable[[nn.Module, Tensor, Tensor], Named]


class Block(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seqlen, width) → the same."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        return x + self.out(flash_attn_jvp(q, k, v, causal=True).flatten(2))


class Network(nn.Sequential):
    """Blocks, which keep their activations or are checkpointed."""

    checkpoint: Callable[..., Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seqlen, width) → the same."""
        for block in self:
            x = block(x) if self.checkpoint is None else self.checkpoint(block, x)
        return x


def network(dtype: torch.dtype) -> Network:
    """Two blocks, with the same weights each time."""
    torch.manual_seed(0)
    return Network(Block(), Block()).to(dtype)


def point_and_direction(dtype: torch.dtype, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Part of a batch and its tangent; both require grad."""
    generator = torch.Generator().manual_seed(1)
    both = torch.randn(2, BATCH, SEQLEN, WIDTH, dtype=torch.float64, generator=generator)
    x, tx = both[:, part].to(dtype)
    return x.requires_grad_(), tx.requires_grad_()


# ----------------------------------------------------------------------------
# Derivatives. Every loss is a sum over the batch.


def without_tangents(model: nn.Module, x: Tensor, tx: Tensor) -> Named:
    out = model(x)
    return {"out": out, **gradients(model, (out**3).sum(), x=x)}


def jvp_without_grad(model: nn.Module, x: Tensor, tx: Tensor) -> Named:
    with torch.no_grad():
        out, tangent = jvp(model, (x,), (tx,))
    return {"out": out, "tangent": tangent}


def through_out_and_tangent(model: nn.Module, x: Tensor, tx: Tensor) -> Named:
    out, tangent = jvp(model, (x,), (tx,))
    loss = (out**3).sum() + (tangent**3).sum()
    return {"out": out, "tangent": tangent, **gradients(model, loss, x=x, tx=tx)}


def through_the_tangent(model: nn.Module, x: Tensor, tx: Tensor) -> Named:
    """The loss includes 0 · out, because DDP averages only if every weight has a gradient."""
    out, tangent = jvp(model, (x,), (tx,))
    return gradients(model, (tangent**3).sum() + 0 * out.sum(), x=x, tx=tx)


def through_checkpoints(model: nn.Module, x: Tensor, tx: Tensor) -> Named:
    checkpoint_blocks(model, checkpoint_jvp)
    return through_out_and_tangent(model, x, tx)


def in_one_pass(model: nn.Module, x: Tensor, tx: Tensor) -> Named:
    """As in the consistency loss: the gradient flows through the output, not the tangent."""
    checkpoint_blocks(model, checkpoint_primal)
    out, tangent = jvp(model, (x,), (tx,))
    loss = ((out - out.detach() + tangent.detach()) ** 3).sum()
    return {"out": out, "tangent": tangent, **gradients(model, loss, x=x)}


def checkpoint_blocks(model: nn.Module, checkpoint: Callable[..., Tensor]) -> None:
    for module in model.modules():
        if isinstance(module, Network):
            module.checkpoint = checkpoint


def inside_replace_sdpa(model: nn.Module, x: Tensor, tx: Tensor) -> Named:
    """The collectives that gather parameters, which have no tangents, work there."""
    with replace_sdpa():
        return through_checkpoints(model, x, tx)


def towards_a_target(model: nn.Module, x: Tensor, tx: Tensor) -> Named:
    """The target comes from a JVP without gradients, as in the consistency loss."""
    with torch.no_grad():
        out, tangent = jvp(model, (x,), (tx,))
    return gradients(model, ((model(x) - out + tangent) ** 3).sum(), x=x)


def gradients(model: nn.Module, loss: Tensor, **inputs: Tensor) -> Named:
    """Gradients of the inputs, as "grad of <name>", and of all weights, unsharded, by name."""
    loss.backward()
    weights = {name.removeprefix("module."): w.grad for name, w in model.named_parameters()}
    return {
        **{f"grad of {name}": x.grad for name, x in inputs.items()},
        **{name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in weights.items()},
    }


DERIVATIVES: list[Derivative] = [
    *(without_tangents, jvp_without_grad, towards_a_target),
    *(through_out_and_tangent, through_the_tangent, through_checkpoints, in_one_pass),
    inside_replace_sdpa,
]


# ----------------------------------------------------------------------------
# What DDP does not support


def after_a_weight_had_no_gradient(model: nn.Module, x: Tensor, tx: Tensor) -> Named:
    """The tangent does not depend on the last bias."""
    _, tangent = jvp(model, (x,), (tx,))
    tangent.sum().backward()
    return jvp_with_grad(model, x, tx)


def with_search_for_unused_weights(model: nn.Module, x: Tensor, tx: Tensor) -> Named:
    return jvp_with_grad(DistributedDataParallel(model.module, find_unused_parameters=True), x, tx)


def with_a_static_graph(model: nn.Module, x: Tensor, tx: Tensor) -> Named:
    return jvp_with_grad(DistributedDataParallel(model.module, static_graph=True), x, tx)


def jvp_with_grad(model: nn.Module, x: Tensor, tx: Tensor) -> Named:
    out, tangent = jvp(model, (x,), (tx,))
    return {"out": out, "tangent": tangent}


# Each with part of its error message.
REFUSED: dict[Derivative, str] = {
    after_a_weight_had_no_gradient: "Expected to have finished reduction",
    with_search_for_unused_weights: "setup_context",
    with_a_static_graph: "setup_context",
}


# ----------------------------------------------------------------------------
# Parallel models


def sharded(model: nn.Sequential, **options: Any) -> nn.Module:
    """Shard every block on its own, as is usual for large models."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


@dataclass(frozen=True)
class Parallel:
    """A kind of data parallelism.

    Attributes:
        name: the name in test ids.
        wrap: makes a model parallel.
        dtype: dtype of weights and data.
        computes_in: dtype of the computation.
    """

    name: str
    wrap: Callable[[nn.Sequential], nn.Module]
    dtype: torch.dtype
    computes_in: torch.dtype


_MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
PARALLEL = [
    Parallel("DDP-float64", DistributedDataParallel, torch.float64, torch.float64),
    Parallel("DDP-float32", DistributedDataParallel, torch.float32, torch.float32),
    Parallel("FSDP2-float64", sharded, torch.float64, torch.float64),
    Parallel("FSDP2-float32", sharded, torch.float32, torch.float32),
    Parallel("FSDP2-mixed", partial(sharded, mp_policy=_MIXED), torch.float32, torch.bfloat16),
]


def part_of(rank: int) -> slice:
    """The rank's part of the batch."""
    size = BATCH // RANKS
    return slice(rank * size, (rank + 1) * size)


def outcomes(rank: int) -> dict[str, dict[str, Named | str]]:
    """Results or error messages on this rank, by kind of parallelism and by derivative."""
    return {
        **{
            parallel.name: {f.__name__: _outcome(parallel, f, rank) for f in DERIVATIVES}
            for parallel in PARALLEL
        },
        "refused": {f.__name__: _outcome(PARALLEL[0], f, rank) for f in REFUSED},
    }


def _outcome(parallel: Parallel, derivative: Derivative, rank: int) -> Named | str:
    model = parallel.wrap(network(parallel.dtype))
    try:
        found = derivative(model, *point_and_direction(parallel.dtype, part_of(rank)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return {name: y.detach() for name, y in found.items()}
