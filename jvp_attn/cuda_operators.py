"""Backend `cuda`: the four maps as operators of torch, so that tracers see one node, not pointers.

`torch.ops.jvp_attn.*` have an implementation for CUDA devices and shapes for tensors without data
(FakeTensorMode, the device "meta"). Their derivatives are those of the Functions that call them;
by themselves they have none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from jvp_attn.cuda import ShapesOnly, kernel_maps
from jvp_attn.maps import (
    AttentionMaps,
    AttentionOptions,
    Gradients,
    Outputs,
    TangentGradients,
    TangentOutputs,
)

_OPTIONS = "float softmax_scale, bool causal, bool residuals"
_TANGENTS = "Tensor? tq, Tensor? tk, Tensor? tv"
_SCHEMAS = {
    "forward": f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor, Tensor?)",
    "forward_tangent": f"(Tensor q, Tensor k, Tensor v, {_TANGENTS}, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor?, Tensor?)",
    "backward": "(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? out_residual, "
    f"Tensor? grad_out, Tensor? grad_lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    "tangent_backward": f"(Tensor q, Tensor k, Tensor v, {_TANGENTS}, Tensor out, Tensor lse, "
    "Tensor tout, Tensor mu, Tensor? out_residual, Tensor? tout_residual, Tensor? grad_out, "
    f"Tensor? grad_lse, Tensor? grad_tout, Tensor? grad_mu, {_OPTIONS}, "
    "bool[3] needs_tangent_grads) -> (Tensor, Tensor, Tensor, Tensor?, Tensor?, Tensor?)",
}


# ----------------------------------------------------------------------------
# The maps


def forward(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Outputs:
    """As `AttentionMaps.forward`."""
    return torch.ops.jvp_attn.forward(q, k, v, *_scalars(options))


def forward_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    options: AttentionOptions,
) -> TangentOutputs:
    """As `AttentionMaps.forward_tangent`."""
    return torch.ops.jvp_attn.forward_tangent(q, k, v, tq, tk, tv, *_scalars(options))


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    out_residual: Tensor | None,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    options: AttentionOptions,
) -> Gradients:
    """As `AttentionMaps.backward`."""
    return torch.ops.jvp_attn.backward(
        q, k, v, out, lse, out_residual, grad_out, grad_lse, *_scalars(options)
    )


def tangent_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tout: Tensor,
    mu: Tensor,
    out_residual: Tensor | None,
    tout_residual: Tensor | None,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_tout: Tensor | None,
    grad_mu: Tensor | None,
    options: AttentionOptions,
    needs_tangent_grads: tuple[bool, bool, bool],
) -> tuple[Gradients, TangentGradients]:
    """As `AttentionMaps.tangent_backward`."""
    gq, gk, gv, gtq, gtk, gtv = torch.ops.jvp_attn.tangent_backward(
        *(q, k, v, tq, tk, tv, out, lse, tout, mu, out_residual, tout_residual),
        *(grad_out, grad_lse, grad_tout, grad_mu),
        *_scalars(options),
        needs_tangent_grads,
    )
    return (gq, gk, gv), (gtq, gtk, gtv)


def _scalars(options: AttentionOptions) -> tuple[float, bool, bool]:
    return options.softmax_scale, options.causal, options.residuals


# ----------------------------------------------------------------------------
# The operators


def implementations(maps: Callable[[], AttentionMaps]) -> dict[str, Callable[..., Any]]:
    """What the operators do, by their names: call the maps, which are made when they are needed."""

    def run(name: str, *arguments: Any) -> Any:
        *tensors, scale, causal, residuals = arguments
        compute = getattr(maps(), name)
        return compute(*tensors, AttentionOptions(scale, causal, "cuda", residuals))

    def run_tangent_backward(*arguments: Any) -> Any:
        *others, needs_tangent_grads = arguments
        *tensors, scale, causal, residuals = others
        options = AttentionOptions(scale, causal, "cuda", residuals)
        compute: Any = maps().tangent_backward
        gradients, tangent_gradients = compute(*tensors, options, tuple(needs_tangent_grads))
        return *gradients, *tangent_gradients

    return {
        **{name: partial(run, name) for name in ("forward", "forward_tangent", "backward")},
        "tangent_backward": run_tangent_backward,
    }


_library = torch.library.Library("jvp_attn", "DEF")
_on_cuda, _without_data = implementations(cache(kernel_maps)), implementations(ShapesOnly)
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _on_cuda[_name], "CUDA")
    torch.library.register_fake(f"jvp_attn::{_name}", _without_data[_name], lib=_library)
