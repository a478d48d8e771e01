"""FSDP2 for training with exact JVPs: parameters, gradients and optimizer states in shards.

    weights      float32 master weights in shards; a block is gathered in param_dtype when it runs.
                 Networks that are not trained may keep shards in param_dtype (freeze)
    gradients    sum over the ranks of a sample (context parallel), mean over the data-parallel
                 ranks, in float32
    inputs       are not cast, because a time in bfloat16 makes dF/dt wrong; the network casts its
                 latents and embeddings itself

The mesh has one dimension (FSDP: shards over all ranks) or two (HSDP: copies, then shards).
Everything here leaves a network without sharded modules as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from rcm.validation import require_integer

MASTER_DTYPES = (torch.float32, torch.float64)


def shard(
    network: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    data_size: int,
    param_dtype: torch.dtype | None = None,
    methods: Iterable[str] = (),
) -> None:
    """Shard a network in place, each block on its own and the rest as one more group.

    network: its class changes to a subclass that is an FSDPModule; on any device, or meta.
    blocks: submodules that are gathered one at a time, such as the layers of a transformer, and
        every submodule that is also called from outside of network.forward.
    mesh: (shard,) or (replicate, shard), of any size.
    data_size: number of ranks with different samples; gradients are averaged over them.
    param_dtype: dtype of the computation, usually bfloat16; None is that of the weights.
    methods: names of methods of the network that are called in place of its forward.

    Raises ValueError unless all parameters, frozen ones too, have one dtype, float32 (or float64
    in tests, with several shards in each copy), or param_dtype in a frozen network; none of them
    is shared, the blocks are different submodules, data_size fits the mesh, and the network is not
    sharded yet.
    """
    blocks = list(blocks)
    _require_mesh(mesh, data_size)
    _require_blocks(network, blocks)
    _require_master_weights(network, param_dtype)
    _require_dtype_of_copies(network, mesh, data_size)
    reduce_dtype = None if param_dtype is None else torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    for module in (*blocks, network):
        group = fully_shard(module, mesh=mesh, mp_policy=policy)
        group.set_gradient_divide_factor(float(data_size))
        # NCCL's own averages know one factor, the number of ranks. With one shard FSDP2 divides
        # before the all-reduce of the copies; after forced sums it would divide a second time.
        group.set_force_sum_reduction_for_comms(mesh.size(mesh.ndim - 1) > 1)
    for name in methods:
        register_fsdp_forward_method(network, name)


def freeze(network: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Stop the training of a network that is not sharded yet; keep its weights in `dtype` if given.

    In the dtype of the computation they take half the memory of float32, and the blocks that are
    gathered are the same. Buffers keep their dtype, as they do in mixed precision.
    """
    network.requires_grad_(False)
    if dtype is not None:
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)


def reshard(network: nn.Module) -> None:
    """Make the parameters shards again.

    After a forward pass without a backward pass, the last group of a network is still gathered.
    Call this before reading or changing `network.parameters()` by hand.
    """
    for module in _sharded_modules(network):
        module.reshard()


def reset_iteration(network: nn.Module) -> None:
    """Forget all forward passes, and the gradients of unfinished micro-batches.

    Call it after an exception in a forward or backward pass, when a step is skipped, and once per
    iteration for a network that never has a backward pass: it records every forward. Gradients
    that are already in `.grad` stay; zero_grad() removes them.
    """
    for module in _outermost_sharded_modules(network):
        module.reset_iter_state()


@contextmanager
def accumulating_gradients(network: nn.Module) -> Iterator[None]:
    """Inside the block, backward passes belong to micro-batches before the last one of a step.

    Run the last micro-batch outside. Gradients are sums over micro-batches: divide each loss by
    their number, which must be the same on every rank. Each micro-batch is added to the gradients
    in shards; only the all-reduce of the copies (HSDP) waits for the last one. Without any
    communication, every rank would hold float32 gradients of the whole network.
    """
    sharded = list(_sharded_modules(network))
    for module in sharded:
        module.set_requires_all_reduce(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.set_requires_all_reduce(True, recurse=False)


def _sharded_modules(network: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in network.modules() if isinstance(module, FSDPModule))


def _outermost_sharded_modules(network: nn.Module) -> Iterator[FSDPModule]:
    if isinstance(network, FSDPModule):
        yield network
    else:
        for child in network.children():
            yield from _outermost_sharded_modules(child)


# ---- checks ------------------------------------------------------------------------------------


def _require_mesh(mesh: DeviceMesh, data_size: int) -> None:
    if mesh.ndim not in (1, 2):
        raise ValueError(
            f"the mesh has {mesh.ndim} dimensions; expected (shard,) or (replicate, shard)"
        )
    if mesh.ndim == 2 and mesh.mesh_dim_names is None:
        raise ValueError("the two dimensions of the mesh have no names, which FSDP2 requires")
    require_integer(1, data_size=data_size)
    if mesh.size() % data_size:
        raise ValueError(f"data_size is {data_size}; it must divide the {mesh.size()} ranks")
    copies = mesh.size(0) if mesh.ndim == 2 else 1
    if data_size % copies:
        raise ValueError(
            f"data_size is {data_size}; it must be a multiple of the {copies} copies of the "
            "weights, because the ranks that share a sample share their weights too"
        )


def _require_blocks(network: nn.Module, blocks: list[nn.Module]) -> None:
    if any(_sharded_modules(network)):
        raise ValueError(f"{type(network).__name__} is sharded already; shard each network once")
    inside = {id(module) for module in network.modules()} - {id(network)}
    for i, block in enumerate(blocks):
        if id(block) not in inside:
            raise ValueError(
                f"block {i}, a {type(block).__name__}, is no submodule of {type(network).__name__}"
            )
    if len({id(block) for block in blocks}) < len(blocks):
        raise ValueError("the same block is given more than once")


def _require_master_weights(network: nn.Module, param_dtype: torch.dtype | None) -> None:
    parameters = dict(network.named_parameters(remove_duplicate=False))
    names: dict[int, str] = {}
    for name, parameter in parameters.items():
        other = names.setdefault(id(parameter), name)
        if other != name:
            raise ValueError(
                f"{other} and {name} are one parameter; shared weights cannot be sharded"
            )
    dtypes = {parameter.dtype for parameter in parameters.values()}
    trained = any(parameter.requires_grad for parameter in parameters.values())
    allowed = MASTER_DTYPES if trained else (*MASTER_DTYPES, param_dtype)
    for name, parameter in parameters.items():
        if parameter.dtype not in allowed or len(dtypes) > 1:
            raise ValueError(
                f"{name} has dtype {parameter.dtype}; all weights must be float32 master weights: "
                "call network.float() first, and choose the dtype of the computation by param_dtype"
            )


def _require_dtype_of_copies(network: nn.Module, mesh: DeviceMesh, data_size: int) -> None:
    """FSDP2 would divide gradients in float64 before and after the all-reduce of the copies."""
    one_shard_each = mesh.ndim == 2 and mesh.size(1) == 1 and data_size > 1
    if one_shard_each and any(p.dtype == torch.float64 for p in network.parameters()):
        raise ValueError(
            f"the weights are float64, and the mesh {tuple(mesh.shape)} has copies of one shard "
            "each, whose gradients FSDP2 divides twice; use float32 or more shards"
        )
