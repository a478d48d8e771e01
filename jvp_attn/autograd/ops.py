"""The primitives as torch operators, so that tracers see one node each.

`torch.ops.jvp_attn.*` compute with the backend that the options name. Fake and meta tensors get
results of the right shapes. In eager mode the derivatives are those of the Functions in
`jvp_attn.autograd.functions`; the ones registered here are for torch.compile, which does not trace
a Function that has a jvp rule, and for graphs of torch.export and make_fx.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from jvp_attn.autograd.duals import unpack_duals
from jvp_attn.autograd.signatures import BACKWARD, FORWARD, FORWARD_JVP, JVP_BACKWARD, Signature
from jvp_attn.backends.select import get_backend, get_meta_backend
from jvp_attn.types import (
    AttentionBackend,
    AttentionOptions,
    Causal,
    Cotangents,
    Gradients,
    Inputs,
    JvpCotangents,
    JvpOutputs,
    Needs,
    Outputs,
    Tangents,
)
from jvp_attn.validation import check_lengths

# ----------------------------------------------------------------------------
# Calling the operators


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
        *torch.ops.jvp_attn.backward(*inputs, *outputs, *cotangents, needs, *_scalars(options))
    )


def jvp_backward(
    inputs: Inputs,
    tangents: Tangents,
    outputs: JvpOutputs,
    cotangents: JvpCotangents,
    needs: Needs,
    options: AttentionOptions,
) -> tuple[Gradients, Gradients]:
    """As `AttentionBackend.jvp_backward`."""
    gradients = torch.ops.jvp_attn.jvp_backward(
        *inputs, *tangents, *outputs, *cotangents, needs, *_scalars(options)
    )
    n = len(Gradients._fields)
    return Gradients(*gradients[:n]), Gradients(*gradients[n:])


# ----------------------------------------------------------------------------
# Options as scalars, in the order of the fields of AttentionOptions


_OPTIONS_SCHEMA = (
    "float softmax_scale, int causal, str backend, bool return_lo, SymInt[]? max_seqlens, "
    "bool deterministic, SymInt mask_group"
)
_N_OPTIONS = len(fields(AttentionOptions))


def _scalars(options: AttentionOptions) -> tuple[Any, ...]:
    return (
        options.softmax_scale,
        int(options.causal),
        options.backend,
        options.return_lo,
        options.max_seqlens,
        options.deterministic,
        options.mask_group,
    )


def _options(
    scale: float,
    causal: int,
    backend: str,
    return_lo: bool,
    max_seqlens: Any,
    deterministic: bool,
    mask_group: int,
) -> AttentionOptions:
    lengths = None if max_seqlens is None else tuple(max_seqlens)
    return AttentionOptions(
        scale, Causal(causal), backend, return_lo, lengths, deterministic, mask_group
    )


# ----------------------------------------------------------------------------
# Registration


def unpack(signature: Signature, arguments: Sequence[Any]) -> list[Any]:
    """From the arguments of an operator to those of its primitive: groups of tensors, options."""
    groups = signature.unpack(arguments[:-_N_OPTIONS])
    if signature.results[0] is Gradients:
        groups[-1] = tuple(groups[-1])  # the needs, a list
    return [*groups, _options(*arguments[-_N_OPTIONS:])]


def _implementation(
    name: str, signature: Signature, get_backend: Callable[[str], AttentionBackend], *, check: bool
) -> Callable[..., Any]:
    """What an operator does.

    Args:
        name, signature: of the primitive.
        get_backend: finds a backend by its name.
        check: whether to check the values in the inputs of the forward primitives.
    """

    def compute(*arguments: Any) -> Any:
        inputs, *others, options = unpack(signature, arguments)
        if check and not is_backward:
            check_lengths(inputs, options)
        results = getattr(get_backend(options.backend), name)(inputs, *others, options)
        return tuple(results) if len(signature.results) == 1 else sum(results, start=())

    is_backward = signature.results[0] is Gradients
    return compute


SIGNATURES = {
    "forward": FORWARD,
    "forward_jvp": FORWARD_JVP,
    "backward": BACKWARD,
    "jvp_backward": JVP_BACKWARD,
}
_library = torch.library.Library("jvp_attn", "DEF")
for _name, _signature in SIGNATURES.items():
    _library.define(_name + _signature.schema(_OPTIONS_SCHEMA))
    _compute = _implementation(_name, _signature, get_backend, check=True)
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _compute, _device)
    _compute_meta = _implementation(_name, _signature, get_meta_backend, check=False)
    torch.library.register_fake(f"jvp_attn::{_name}", _compute_meta, lib=_library)


# ----------------------------------------------------------------------------
# Forward mode. The autograd kernels of torch.library drop tangents without an error


# The only one: torch does not nest levels. Graphs of the compiler do not set fwAD._current_level.
_LEVEL = 0


class _LibraryWithTangents(torch.library.Library):
    """A library whose autograd kernels have a rule for tangents."""

    def impl(
        self, op_name: Any, fn: Any, dispatch_key: str = "", *args: Any, **options: Any
    ) -> None:
        if dispatch_key == "Autograd":
            fn = _with_tangents(op_name, fn)
        super().impl(op_name, fn, dispatch_key, *args, **options)


def _with_tangents(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd kernel of an operator, which also takes dual numbers."""

    def autograd_kernel(keyset: Any, *arguments: Any) -> Any:
        if not (torch._C._is_fwd_grad_enabled() and any(map(_has_tangent, arguments))):
            return kernel(keyset, *arguments)
        if name != "forward":
            raise NotImplementedError(
                f"torch.ops.jvp_attn.{name} has no forward derivative: call flash_attn_jvp, which "
                "has second derivatives except jvp of jvp, outside of torch.compile, torch.export "
                "and make_fx"
            )
        inputs, *scalars = FORWARD.unpack(arguments)
        options = _options(*scalars)
        outputs = forward_jvp(*unpack_duals(inputs, level=_LEVEL), options)
        out = fwAD.make_dual(outputs.out, outputs.tout, level=_LEVEL)
        lse = fwAD.make_dual(outputs.lse, outputs.mu, level=_LEVEL)
        return tuple(Outputs(out, lse, outputs.out_lo, outputs.lse_lo))

    return autograd_kernel


def _has_tangent(argument: Any) -> bool:
    return (
        isinstance(argument, Tensor)
        and fwAD.unpack_dual(argument, level=_LEVEL).tangent is not None
    )


# ----------------------------------------------------------------------------
# Derivatives in reverse mode, for torch.compile and torch.export


def _save_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    tensors, scalars = inputs[:-_N_OPTIONS], inputs[-_N_OPTIONS:]
    ctx.save_for_backward(*tensors, *output)
    ctx.options = _options(*scalars)
    ctx.set_materialize_grads(False)


def _backward_of_forward(ctx: Any, grad_out: Any, grad_lse: Any, *_: Any) -> Any:
    inputs, *outputs = FORWARD.unpack(ctx.saved_tensors)
    needs = FORWARD.needs(ctx.needs_input_grad)
    cotangents = Cotangents(grad_out, grad_lse)
    gradients = backward(inputs, Outputs(*outputs), cotangents, needs, ctx.options)
    return FORWARD.gradients({Inputs: gradients}, len(ctx.needs_input_grad))


def _backward_of_forward_jvp(ctx: Any, *cotangents: Any) -> Any:
    inputs, tangents, *outputs = FORWARD_JVP.unpack(ctx.saved_tensors)
    grad_out, grad_lse, grad_tout, grad_mu, *_ = cotangents
    gradients, tangent_gradients = jvp_backward(
        inputs,
        tangents,
        JvpOutputs(*outputs),
        JvpCotangents(grad_out, grad_lse, grad_tout, grad_mu),
        FORWARD_JVP.needs(ctx.needs_input_grad),
        ctx.options,
    )
    return FORWARD_JVP.gradients(
        {Inputs: gradients, Tangents: tangent_gradients}, len(ctx.needs_input_grad)
    )


def _backward_of_backward(ctx: Any, *cotangents: Any) -> Any:
    raise NotImplementedError(
        "the operators have no second derivative: call flash_attn_jvp, which has, outside of "
        "torch.compile"
    )


_autograd_library = _LibraryWithTangents("jvp_attn", "FRAGMENT")
for _name, _backward, _save in (
    ("forward", _backward_of_forward, _save_for_backward),
    ("forward_jvp", _backward_of_forward_jvp, _save_for_backward),
    ("backward", _backward_of_backward, None),
    ("jvp_backward", _backward_of_backward, None),
):
    torch.library.register_autograd(
        f"jvp_attn::{_name}", _backward, setup_context=_save, lib=_autograd_library
    )
