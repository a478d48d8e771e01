"""Which CUDA kernels compute a primitive, or why none does."""

from __future__ import annotations

import torch
from torch import Tensor

from jvp_attn.backends.kernel_table import (
    HEAD_DIMS,
    KERNELS,
    OF_ROWS,
    KernelEntry,
    kernel_name,
    padded_head_dim,
    sm90_head_dim,
)

ELEMENT_OF_DTYPE = {torch.bfloat16: "bf16", torch.float16: "fp16"}
MIN_CAPABILITY = (8, 0)
# Its machine code (sm_90a) runs only on compute capability 9.0.
HOPPER = (9, 0)
# The kernels count rows and keys with 32 bits, and add two such numbers.
MAX_SEQLEN = 2**30 - 1
# The kernels of csrc/cpu have buffers for rows of this length too.
MAX_HEAD_DIM = HEAD_DIMS[-1]

# The steps of each primitive, one launch each. Of two plans, the first is the faster one.
_LAUNCH_PLANS: dict[str, tuple[tuple[str, ...], ...]] = {
    "forward": (("forward",),),
    "forward_jvp": (("forward_jvp",), ("forward", "tangent_only")),
    "backward": (("preprocess", "backward_dq", "backward_dkv"),),
    "jvp_backward": (("preprocess", "jvp_backward_dq", "jvp_backward_dkv"),),
}
PRIMITIVES = tuple(_LAUNCH_PLANS)

# `backward` on Hopper in one pass over the scores: key blocks accumulate the gradient of Q
# atomically in float32, and the last step converts it. The order is nondeterministic.
_BACKWARD_ATOMIC_DQ = ("preprocess", "backward", "bwd_postprocess")

# The faster step on Hopper if neither keys nor values have tangents.
_Q_TANGENT_ONLY = {"forward_jvp": "forward_jvp_q"}


def kernels_of(
    primitive: str, dtype: torch.dtype, head_dim: int, head_dim_v: int, masked: bool = False
) -> tuple[KernelEntry, ...] | None:
    """The kernels that compute a primitive, in the order of launches; None if there are none.

    Args:
        primitive: one of PRIMITIVES.
        dtype: float16 or bfloat16.
        head_dim, head_dim_v: that of q and k, and that of v.
        masked: whether there is a mask.
    """
    element, padded = ELEMENT_OF_DTYPE[dtype], padded_head_dim(head_dim, head_dim_v)
    for steps in _LAUNCH_PLANS[primitive]:
        if kernels := _kernels_of_steps(steps, element, padded, masked):
            return kernels
    return None


def on_hopper(kernel: KernelEntry, *, q_tangent_only: bool = False) -> KernelEntry:
    """The kernel for Hopper that computes the same; the given kernel if there is none.

    It supports fewer layouts: see `KernelCall.fits_tma`.
    """
    step = kernel.step
    if q_tangent_only:
        step = _Q_TANGENT_ONLY.get(step, step)
    head_dim = sm90_head_dim(kernel.head_dim)
    name = kernel_name(step, kernel.element, head_dim, kernel.masked, "sm90")
    return KERNELS.get(name, kernel)


def backward_atomic_dq(
    dtype: torch.dtype, head_dim: int, head_dim_v: int
) -> tuple[KernelEntry, ...] | None:
    """The kernels of `backward` on Hopper that accumulate the gradient of Q atomically.

    None if there are none. They need 5 matrix products instead of 7 and float32 memory for the
    accumulator, and have the same requirements as those of `on_hopper`.

    Args:
        dtype, head_dim, head_dim_v: as in `kernels_of`.
    """
    element = ELEMENT_OF_DTYPE[dtype]
    padded = sm90_head_dim(padded_head_dim(head_dim, head_dim_v))
    return _kernels_of_steps(_BACKWARD_ATOMIC_DQ, element, padded, arch="sm90")


def _kernels_of_steps(
    steps: tuple[str, ...],
    element: str,
    head_dim: int | None,
    masked: bool = False,
    arch: str = "sm80",
) -> tuple[KernelEntry, ...] | None:
    """A kernel for each step; None if one is missing."""
    names = [
        kernel_name(step, element)
        if step in OF_ROWS
        else kernel_name(step, element, head_dim, masked, arch)
        for step in steps
    ]
    if all(name in KERNELS for name in names):
        return tuple(KERNELS[name] for name in names)
    return None


def why_no_kernels(q: Tensor, k: Tensor, v: Tensor, capability: tuple[int, int]) -> str | None:
    """Why the CUDA kernels cannot compute a problem on a device; None if they can."""
    if capability < MIN_CAPABILITY:
        return (
            "the kernels need compute capability {}.{} or newer, and the device has {}.{}"
        ).format(*MIN_CAPABILITY, *capability)
    if q.dtype not in ELEMENT_OF_DTYPE:
        return f"the kernels compute in float16 and bfloat16, and q has {str(q.dtype)[6:]}"
    return why_no_sizes(q, k, v)


def why_no_sizes(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels, CUDA or CPU, cannot compute problems of these sizes; None if they can."""
    for name, x in (("q", q), ("k", k)):
        if x.shape[1] > MAX_SEQLEN:
            return (
                f"the kernels take sequences up to {MAX_SEQLEN}, and that of {name} is {x.shape[1]}"
            )
    for name, size in (("head_dim", q.shape[3]), ("head_dim_v", v.shape[3])):
        if size > MAX_HEAD_DIM:
            return f"{name} {size} is above {MAX_HEAD_DIM}, the kernels' largest"
        if size == 0:
            return f"{name} is 0, and the kernels' smallest is 1"
    return None
