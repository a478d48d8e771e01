"""Collectives of torch.distributed in `replace_sdpa`: they drop tangents, so there they raise.

torch has no forward derivative for them and does not say so: the functional ones, also those with
`autograd` in their names, and those that write to their arguments give results without tangents.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.distributed as dist
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.utils._pytree import tree_leaves

_NAMES = (
    *("all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_single"),
    *("all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "broadcast"),
    *("gather", "irecv", "isend", "recv", "reduce", "reduce_scatter", "reduce_scatter_single"),
    *("reduce_scatter_tensor", "scatter", "send"),
)

# Functions that write to their arguments. A mode sees their calls with torch 2.13 and newer.
IN_PLACE = {
    getattr(dist, name): name for name in _NAMES if dist.is_available() and hasattr(dist, name)
}

# Functional ones call operators of these namespaces.
_NAMESPACES = {
    *("_c10d_functional", "_c10d_functional_autograd", "_dtensor", "c10d", "c10d_functional"),
    "symm_mem",
}


def is_collective(name: str) -> bool:
    """Whether an operator of this name communicates."""
    return name.partition(".")[0] in _NAMESPACES


def raise_if_tangent(collective: str, args: Any, kwargs: Any) -> None:
    """Raise if a tensor among the arguments of a collective has a tangent.

    Raises:
        NotImplementedError: one has, and no autograd.Function with a rule for it contains the call.
    """
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if any(x.is_floating_point() and _has_tangent(x) for x in tensors):
        raise NotImplementedError(
            f"{collective} was called inside replace_sdpa() on a tensor with a tangent, which it "
            "would drop: torch.distributed has no forward derivatives. Call it in the forward and "
            "in the jvp rule of a torch.autograd.Function with setup_context, once for the tensor "
            "and once for its tangent; rcm.distributed has such collectives"
        )


def _has_tangent(x: Tensor) -> bool:
    """Whether it is a dual number of any active transform; in the rules of a Function it is not."""
    if torch.compiler.is_compiling():
        return fwAD.unpack_dual(x).tangent is not None
    if not torch._C._are_functorch_transforms_active():
        return fwAD.unpack_dual(x, level=_LEVEL).tangent is not None
    transform = retrieve_current_functorch_interpreter()
    if transform.key() == TransformType.Jvp and fwAD.unpack_dual(x).tangent is not None:
        return True
    if torch._C._functorch.maybe_get_level(x) == transform.level():
        x = torch._C._functorch.get_unwrapped(x)
    with transform.lower():
        return _has_tangent(x)


# That of dual numbers outside of torch.func: torch does not nest levels.
_LEVEL = 0
