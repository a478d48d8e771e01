"""Every transform of torch.func, alone and composed, goes through attention exactly."""

from collections.abc import Callable

import pytest
import torch
from attention_cases import Case, assert_close, small_blocks
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from jvp_attn import AttentionOptions, FlashAttention, FlashAttentionTangent

Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

CASES = {
    "grouped heads": Case(seqlen_q=3, seqlen_k=4),
    "causal": Case(batch=1, seqlen_q=4, seqlen_k=4, heads=2, heads_k=2, head_dim=2, causal=True),
}


def energy(attention: Attention, *x: Tensor) -> Tensor:
    """A function of out and lse with derivatives of every order."""
    out, lse = attention(*x)
    return (out**3).sum() + lse.sin().sum()


# ----------------------------------------------------------------------------
# Derivatives of attention at x = (q, k, v), in the direction t


def tangent(f: Attention, x: tuple[Tensor, ...], t: tuple[Tensor, ...]):
    return jvp(f, x, t)


def tangent_along_q(f: Attention, x: tuple[Tensor, ...], t: tuple[Tensor, ...]):
    q, *kv = x
    return jvp(lambda q: f(q, *kv), (q,), t[:1])


def pullback(f, x, t):
    out, pull = vjp(f, *x)
    return pull(tuple(y.cos() for y in out))


def gradient_of_the_tangent(f, x, t):
    def size(*x):
        tout, mu = jvp(f, x, t)[1]
        return (tout**3).sum() + mu.sin().sum()

    return grad(size, argnums=(0, 1, 2))(*x)
