"""The implementations of attention that the benchmarks compare, and the operations that they time.

Tensors are (batch, seqlen, heads, head_dim). A contender raises for an operation or problem that it
does not support, and the benchmark prints the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import jvp_attn

# (q, k, v, causal) → out.
Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
Call = Callable[[], Any]

# Floating point operations, in units of batch · heads · seqlen_q · seqlen_k · head_dim.
OPERATIONS = {"forward": 4, "forward+tangent": 12, "backward": 10, "backward of both": 30}


@dataclass(frozen=True)
class Inputs:
    """q, k, v, their tangents, and the cotangents of out and its tangent."""

    primals: tuple[Tensor, Tensor, Tensor]
    tangents: tuple[Tensor, Tensor, Tensor]
    cotangents: tuple[Tensor, Tensor]
    causal: bool


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with jvp_attn.backend(q.device.type):  # raises if there are no kernels
        return jvp_attn.flash_attn_jvp(q, k, v, causal=causal)


def ours_nondeterministic(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    if torch.cuda.get_device_capability(q.device) != (9, 0) or not 64 < q.shape[3] <= 128:
        raise NotImplementedError("its backward is always deterministic")
    with jvp_attn.backend("cuda"):
        return jvp_attn.flash_attn_jvp(q, k, v, causal=causal, deterministic=False)


def torch_sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=causal)


def jvp_flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from jvp_flash_attention.jvp_attention import JVPAttn

    if q.shape != k.shape:
        raise NotImplementedError("it needs as many keys as queries")
    if q.shape[1] % 32:
        raise NotImplementedError("it needs sequence lengths that are multiples of 32")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return JVPAttn.fwd_dual(q, k, v, causal=causal).transpose(1, 2)


PRIMAL = ("forward", "backward")
MATH = "torch SDPA (MATH)"
CONTENDERS: dict[str, tuple[Attention, tuple[str, ...]]] = {
    "jvp_attn": (ours, tuple(OPERATIONS)),
    "jvp_attn (nondeterministic)": (ours_nondeterministic, ("backward",)),
    MATH: (partial(torch_sdpa, SDPBackend.MATH), tuple(OPERATIONS)),
    "torch SDPA (flash)": (partial(torch_sdpa, SDPBackend.FLASH_ATTENTION), PRIMAL),
    "torch SDPA (efficient)": (partial(torch_sdpa, SDPBackend.EFFICIENT_ATTENTION), PRIMAL),
    "torch SDPA (cuDNN)": (partial(torch_sdpa, SDPBackend.CUDNN_ATTENTION), PRIMAL),
    "flash-attn": (flash_attn_2, PRIMAL),
    # It has no backward through its tangent.
    "jvp_flash_attention": (jvp_flash_attention, (*PRIMAL, "forward+tangent")),
}


def call_of(operation: str, attention: Attention, inputs: Inputs) -> Call:
    """The call to be timed; a backward has run its forward already."""
    of_primals = partial(_positional, attention, inputs.causal)
    if operation == "forward":
        return _without_grad(lambda: of_primals(*inputs.primals))
    if operation == "forward+tangent":
        return _without_grad(lambda: torch.func.jvp(of_primals, inputs.primals, inputs.tangents))
    if operation == "backward":
        leaves = _leaves(inputs.primals)
        outputs, cotangents = (of_primals(*leaves),), inputs.cotangents[:1]
    else:
        leaves = _leaves((*inputs.primals, *inputs.tangents))
        outputs, cotangents = torch.func.jvp(of_primals, leaves[:3], leaves[3:]), inputs.cotangents
    return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def _positional(attention: Attention, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, causal)


def _without_grad(call: Call) -> Call:
    return torch.no_grad()(call)


def _leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in tensors)
