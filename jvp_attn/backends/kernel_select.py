"""Which CUDA kernels compute an attention map, and where none does, why."""

from __future__ import annotations

import torch

from jvp_attn.backends.kernel_table import (
    KERNELS,
    OF_ROWS,
    KernelEntry,
    kernel_name,
    padded_head_dim,
)

ELEMENT_OF_DTYPE = {torch.bfloat16: "bf16", torch.float16: "fp16"}
MIN_CAPABILITY = (8, 0)
# Machine code for it runs on no other device, older or newer.
HOPPER = (9, 0)
# The kernels count rows and keys with 32 bits, and add two such numbers.
MAX_SEQLEN = 2**30 - 1

# The steps of each map, one launch each; where a map has two ways, the first is the faster.
_LAUNCH_PLANS: dict[str, tuple[tuple[str, ...], ...]] = {
    "forward": (("forward",),),
    "forward_jvp": (("forward_jvp",), ("forward", "tangent_only")),
    "backward": (("preprocess", "backward_dq", "backward_dkv"),),
    "jvp_backward": (("preprocess", "jvp_backward_dq", "jvp_backward_dkv"),),
}
MAPS = tuple(_LAUNCH_PLANS)

# On Hopper, `backward` in one pass over its scores: blocks of keys add up the gradient of Q in an
# order that varies, and the last step makes it of the sums.
_BACKWARD_ATOMIC_DQ = ("preprocess", "backward", "bwd_postprocess")

# What a step becomes on Hopper where neither keys nor values have tangents.
_Q_TANGENT_ONLY = {"forward_jvp": "forward_jvp_q"}


def kernels_of(
    map_name: str, dtype: torch.dtype, head_dim: int, head_dim_v: int, masked: bool = False
) -> tuple[KernelEntry, ...] | None:
    """The kernels that compute a map, in the order of their launches; None where there are none.

    Args:
        map_name: one of MAPS.
        dtype: float16 or bfloat16.
        head_dim, head_dim_v: that of q and k, and that of v.
        masked: whether there is a mask.
    """
    element, padded = ELEMENT_OF_DTYPE[dtype], padded_head_dim(head_dim, head_dim_v)
    for steps in _LAUNCH_PLANS[map_name]:
        if kernels := _kernels_of_steps(steps, element, padded, masked):
            return kernels
    return None


def on_hopper(kernel: KernelEntry, *, q_tangent_only: bool = False) -> KernelEntry:
    """The kernel for Hopper alone that computes the same as another one; that one if there is none.

    It asks more of a problem: see `KernelCall.on_hopper`.
    """
    step = kernel.step
    if q_tangent_only:
        step = _Q_TANGENT_ONLY.get(step, step)
    name = kernel_name(step, kernel.element, kernel.head_dim, kernel.masked, "sm90")
    return KERNELS.get(name, kernel)


def backward_atomic_dq(
    dtype: torch.dtype, head_dim: int, head_dim_v: int
) -> tuple[KernelEntry, ...] | None:
    """The kernels of `backward` on Hopper where its sums may come in an order that varies.

    None where there are none. They need 5 products instead of 7 and memory for the sums, and ask of
    a problem what those of `on_hopper` ask.

    Args:
        dtype, head_dim, head_dim_v: as in `kernels_of`.
    """
    element, padded = ELEMENT_OF_DTYPE[dtype], padded_head_dim(head_dim, head_dim_v)
    return _kernels_of_steps(_BACKWARD_ATOMIC_DQ, element, padded, arch="sm90")


def _kernels_of_steps(
    steps: tuple[str, ...],
    element: str,
    head_dim: int | None,
    masked: bool = False,
    arch: str = "sm80",
) -> tuple[KernelEntry, ...] | None:
    """A kernel for each step, named as `kernel_name` does; None where one is missing."""
    names = [
        kernel_name(step, element)
        if step in OF_ROWS
        else kernel_name(step, element, head_dim, masked, arch)
        for step in steps
    ]
    if all(name in KERNELS for name in names):
        return tuple(KERNELS[name] for name in names)
    return None


def why_no_kernels(
    dtype: torch.dtype, seqlen_q: int, seqlen_k: int, capability: tuple[int, int]
) -> str | None:
    """Why the kernels cannot compute a problem on a device; None where they can."""
    if capability < MIN_CAPABILITY:
        return (
            "the kernels need compute capability {}.{} or newer, and the device has {}.{}"
        ).format(*MIN_CAPABILITY, *capability)
    if dtype not in ELEMENT_OF_DTYPE:
        return f"the kernels compute in float16 and bfloat16, and q has {str(dtype)[6:]}"
    for name, seqlen in (("q", seqlen_q), ("k", seqlen_k)):
        if seqlen > MAX_SEQLEN:
            return f"the kernels take sequences up to {MAX_SEQLEN}, and that of {name} is {seqlen}"
    return None
