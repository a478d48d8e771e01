"""The four maps as operators of torch, so that tracers see one node each.

`torch.ops.jvp_attn.*` compute with the backend that the options name; tensors without data
(FakeTensorMode, the device "meta") get results of the right shapes. In eager mode the derivatives
are those of the Functions that call them; those registered here are for torch.compile, which does
not trace a Function that has a jvp rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jvp_attn.backends.select import get_backend, get_meta_backend
from jvp_attn.types import (
    AttentionBackend,
    AttentionOptions,
    Causal,
    Cotangents,
    Gradients,
    Inputs,
    JvpOutputs,
    Needs,
    Outputs,
    Tangents,
)
from jvp_attn.validation import check_packing

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
_TANGENTS = "Tensor? tq, Tensor? tk, Tensor? tv, Tensor? tmask"
_OPTIONS = (
    "float softmax_scale, int causal, str backend, bool return_lo, SymInt[]? max_seqlens, "
    "bool deterministic"
)
_N_OPTIONS = 6
# Results that are absent are None all the same: torch takes "Tensor?" for a result that it cannot
# batch by itself.
_SCHEMAS = {
    "forward": f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    "forward_jvp": f"({_INPUTS}, {_TANGENTS}, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "backward": f"({_INPUTS}, Tensor out, Tensor lse, Tensor? out_lo, "
    f"Tensor? grad_out, Tensor? grad_lse, bool[4] needs, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "jvp_backward": f"({_INPUTS}, {_TANGENTS}, Tensor out, Tensor lse, Tensor tout, Tensor mu, "
    "Tensor? out_lo, Tensor? tout_lo, Tensor? grad_out, Tensor? grad_lse, "
    f"Tensor? grad_tout, Tensor? grad_mu, bool[8] needs, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}


# ----------------------------------------------------------------------------
# The maps


def forward(inputs: Inputs, options: AttentionOptions) -> Outputs:
    """As `AttentionBackend.forward`."""
    return Outputs(*torch.ops.jvp_attn.forward(*inputs, *_scalars(options)))


def forward_jvp(inputs: Inputs, tangents: Tangents, options: AttentionOptions) -> JvpOutputs:
    """As `AttentionBackend.forward_jvp`."""
    return JvpOutputs(*torch.ops.jvp_attn.forward_jvp(*inputs, *tangents, *_scalars(options)))


def backward(
    inputs: Inputs,
    outputs: Outputs,
    cotangents: Cotangents,
    needs: Needs,
    options: AttentionOptions,
) -> Gradients:
    """As `AttentionBackend.backward`."""
    return Gradients(
        *torch.ops.jvp_attn.backward(
            *inputs, *outputs, cotangents.out, cotangents.lse, needs, *_scalars(options)
        )
    )


def jvp_backward(
    inputs: Inputs,
    tangents: Tangents,
    outputs: JvpOutputs,
    cotangents: Cotangents,
    needs: Needs,
    options: AttentionOptions,
) -> tuple[Gradients, Gradients]:
    """As `AttentionBackend.jvp_backward`."""
    grads = torch.ops.jvp_attn.jvp_backward(
        *inputs, *tangents, *outputs, *cotangents, needs, *_scalars(options)
    )
    return Gradients(*grads[:4]), Gradients(*grads[4:])


# ----------------------------------------------------------------------------
# The operators


def _scalars(options: AttentionOptions) -> tuple[Any, ...]:
    return (
        options.softmax_scale,
        int(options.causal),
        options.backend,
        options.return_lo,
        options.max_seqlens,
        options.deterministic,
    )


def _options(
    scale: float,
    causal: int,
    backend: str,
    return_lo: bool,
    max_seqlens: Any,
    deterministic: bool,
) -> AttentionOptions:
    lengths = None if max_seqlens is None else tuple(max_seqlens)
    return AttentionOptions(scale, Causal(causal), backend, return_lo, lengths, deterministic)


def _implementations(
    maps: Callable[[str], AttentionBackend],
    check: Callable[[Inputs, AttentionOptions], None] = lambda inputs, options: None,
) -> dict[str, Callable[..., Any]]:
    """What the operators do, by their names.

    Args:
        maps: those of a backend by its name.
        check: raises where inputs hold what they must not.
    """

    def forward(*arguments: Any) -> Any:
        inputs, options = Inputs(*arguments[:6]), _options(*arguments[-_N_OPTIONS:])
        check(inputs, options)
        return tuple(maps(options.backend).forward(inputs, options))

    def forward_jvp(*arguments: Any) -> Any:
        inputs, options = Inputs(*arguments[:6]), _options(*arguments[-_N_OPTIONS:])
        check(inputs, options)
        tangents = Tangents(*arguments[6:10])
        return tuple(maps(options.backend).forward_jvp(inputs, tangents, options))

    def backward(*arguments: Any) -> Any:
        inputs, options = Inputs(*arguments[:6]), _options(*arguments[-_N_OPTIONS:])
        outputs, cotangents = Outputs(*arguments[6:9]), Cotangents(*arguments[9:11])
        needs = tuple(arguments[11])
        return tuple(maps(options.backend).backward(inputs, outputs, cotangents, needs, options))

    def jvp_backward(*arguments: Any) -> Any:
        inputs, options = Inputs(*arguments[:6]), _options(*arguments[-_N_OPTIONS:])
        tangents = Tangents(*arguments[6:10])
        outputs, cotangents = JvpOutputs(*arguments[10:16]), Cotangents(*arguments[16:20])
        needs = tuple(arguments[20])
        gradients, tangent_gradients = maps(options.backend).jvp_backward(
            inputs, tangents, outputs, cotangents, needs, options
        )
        return *gradients, *tangent_gradients

    return {f.__name__: f for f in (forward, forward_jvp, backward, jvp_backward)}


_library = torch.library.Library("jvp_attn", "DEF")
_with_data = _implementations(get_backend, check_packing)
_without_data = _implementations(get_meta_backend)
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _with_data[_name], _device)
    torch.library.register_fake(f"jvp_attn::{_name}", _without_data[_name], lib=_library)


# ----------------------------------------------------------------------------
# Derivatives, for torch.compile


def _save_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    tensors, scalars = inputs[:-_N_OPTIONS], inputs[-_N_OPTIONS:]
    ctx.save_for_backward(*tensors, *output)
    ctx.options = _options(*scalars)
    ctx.set_materialize_grads(False)


def _backward_of_forward(ctx: Any, grad_out: Any, grad_lse: Any, _: None) -> Any:
    inputs, outputs = Inputs(*ctx.saved_tensors[:6]), Outputs(*ctx.saved_tensors[6:])
    needs = tuple(ctx.needs_input_grad[:4])
    gradients = backward(inputs, outputs, Cotangents(grad_out, grad_lse), needs, ctx.options)
    return *gradients, None, None, *_N_OPTIONS * (None,)


def _backward_of_forward_jvp(ctx: Any, *cotangents: Any) -> Any:
    tensors = ctx.saved_tensors
    needs = (*ctx.needs_input_grad[:4], *ctx.needs_input_grad[6:10])
    grad_out, grad_lse, grad_tout, grad_mu, *_ = cotangents
    gradients, tangent_gradients = jvp_backward(
        Inputs(*tensors[:6]),
        Tangents(*tensors[6:10]),
        JvpOutputs(*tensors[10:]),
        Cotangents(grad_out, grad_lse, grad_tout, grad_mu),
        needs,
        ctx.options,
    )
    return *gradients, None, None, *tangent_gradients, *_N_OPTIONS * (None,)


def _backward_of_backward(ctx: Any, *cotangents: Any) -> Any:
    raise NotImplementedError(
        "the operators have no second derivative: call flash_attn_jvp, which has, outside of "
        "torch.compile"
    )


for _name, _backward, _save in (
    ("forward", _backward_of_forward, _save_for_backward),
    ("forward_jvp", _backward_of_forward_jvp, _save_for_backward),
    ("backward", _backward_of_backward, None),
    ("jvp_backward", _backward_of_backward, None),
):
    torch.library.register_autograd(
        f"jvp_attn::{_name}", _backward, setup_context=_save, lib=_library
    )
