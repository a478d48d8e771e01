"""The derivative rules: autograd Functions over the four primitives of `jvp_attn.types`.

    Function                           jvp rule     backward rule (VJP)
    F   FlashAttention                 T            B
    T   FlashAttentionJvp              raises       BT
    B   FlashAttentionBackward         BT           T and BT
    BT  FlashAttentionJvpBackward      raises       raises

The rules of B need no further primitive. With x = (q, k, v, mask):

    JVP of B along (tx, tdO)        = the x part of BT with dO := tdO, dtO := dO
    VJP of B against hx: for dO     = tO of T along hx
                         for x      = the x part of BT with dO := 0, dtO := dO

because <B, h> is the derivative of <dO, O> along h. Each rule takes g_lse along with dO and g_mu
along with dtO. Low-order parts (see `jvp_attn.types`) go from F and T to B and BT and have no
derivative.

`.apply` takes the arguments of the primitive, tensors one by one in the order of the fields of
`Inputs`, `Tangents` and so on (see `jvp_attn.autograd.signatures`), and works under torch.func
transforms.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from jvp_attn.autograd import ops
from jvp_attn.autograd.signatures import BACKWARD, FORWARD, FORWARD_JVP, JVP_BACKWARD, Signature
from jvp_attn.autograd.vmap import vmap_attention
from jvp_attn.types import (
    Cotangents,
    Gradients,
    InputNeeds,
    Inputs,
    JvpCotangents,
    JvpOutputs,
    Outputs,
    Tangents,
)
from jvp_attn.validation import check_tangents

MaybeTensor = Tensor | None

_NO_NEEDS = InputNeeds()

# A compiled function that breaks its graph runs these rules in eager mode, inside of transforms
# that the compiler cannot enter again.
_eager = torch.compiler.disable(reason="the derivative rules of attention run in eager mode")


class _AttentionFunction(Function):
    signature: ClassVar[Signature]

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return vmap_attention(cls.apply, cls.signature, info.batch_size, in_dims, arguments)


class FlashAttention(_AttentionFunction):
    """(*inputs, options) → (out, lse, out_lo, lse_lo), as `AttentionBackend.forward`."""

    signature = FORWARD

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return tuple(ops.forward(*FORWARD.unpack(arguments)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors)
        outputs = Outputs(*output)
        _mark_non_differentiable(ctx, outputs.out_lo, outputs.lse_lo)
        ctx.set_materialize_grads(False)

    @staticmethod
    @_eager
    def backward(ctx: Any, grad_out: MaybeTensor, grad_lse: MaybeTensor, *_: None) -> Any:
        gradients = FlashAttentionBackward.apply(
            *ctx.saved_tensors,
            *Cotangents(grad_out, grad_lse),
            FORWARD.needs(ctx.needs_input_grad),
            ctx.options,
        )
        return FORWARD.gradients({Inputs: Gradients(*gradients)}, len(ctx.needs_input_grad))

    @staticmethod
    @_eager
    def jvp(ctx: Any, *input_tangents: Any) -> Any:
        inputs, *_ = FORWARD.unpack(ctx.saved_tensors)
        tangents = _tangents_of(input_tangents)
        check_tangents(inputs, tangents)
        outputs = JvpOutputs(*FlashAttentionJvp.apply(*inputs, *tangents, ctx.options))
        return outputs.tout, outputs.mu, None, None


class FlashAttentionJvp(_AttentionFunction):
    """(*inputs, *tangents, options) → (out, lse, tout, mu, out_lo, tout_lo, lse_lo).

    Any tangent may be None.
    """

    signature = FORWARD_JVP

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return tuple(ops.forward_jvp(*FORWARD_JVP.unpack(arguments)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors, *output)
        outputs = JvpOutputs(*output)
        _mark_non_differentiable(ctx, outputs.out_lo, outputs.tout_lo, outputs.lse_lo)
        ctx.set_materialize_grads(False)

    @staticmethod
    @_eager
    def backward(
        ctx: Any,
        grad_out: MaybeTensor,
        grad_lse: MaybeTensor,
        grad_tout: MaybeTensor,
        grad_mu: MaybeTensor,
        *_: None,
    ) -> Any:
        inputs, tangents, *outputs = FORWARD_JVP.unpack(ctx.saved_tensors)
        n_arguments = len(ctx.needs_input_grad)
        needs = FORWARD_JVP.needs(ctx.needs_input_grad)
        if grad_tout is None and grad_mu is None:
            out, lse, _tout, _mu, out_lo, _tout_lo, lse_lo = outputs
            gradients = FlashAttentionBackward.apply(
                *inputs,
                *Outputs(out, lse, out_lo, lse_lo),
                *Cotangents(grad_out, grad_lse),
                needs[: len(_NO_NEEDS)],
                ctx.options,
            )
            return FORWARD_JVP.gradients({Inputs: Gradients(*gradients)}, n_arguments)
        gradients = FlashAttentionJvpBackward.apply(
            *(*inputs, *tangents, *outputs),
            *JvpCotangents(grad_out, grad_lse, grad_tout, grad_mu),
            needs,
            ctx.options,
        )
        of_inputs, of_tangents = _split_gradients(gradients)
        return FORWARD_JVP.gradients({Inputs: of_inputs, Tangents: of_tangents}, n_arguments)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "the forward derivative of an attention tangent (jvp of jvp) is not implemented: "
            "differentiate the tangent in reverse mode, with torch.func.grad or .backward(), or "
            "nest torch.func.jvp in `with jvp_attn.backend('math')`, which differentiates to any "
            "order at quadratic memory"
        )


class FlashAttentionBackward(_AttentionFunction):
    """(*inputs, *outputs of F, grad_out, grad_lse, needs, options) → gradients of the inputs.

    A function of the inputs, grad_out and grad_lse: the outputs must be those of `FlashAttention`
    for these inputs; derivatives through them are part of those through the inputs.
    """

    signature = BACKWARD

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return tuple(ops.backward(*BACKWARD.unpack(arguments)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        inputs, _outputs, cotangents, ctx.needs, ctx.options = BACKWARD.unpack(inputs)
        ctx.save_for_backward(*inputs, *cotangents)
        ctx.save_for_forward(*inputs, *cotangents)
        ctx.set_materialize_grads(False)

    @staticmethod
    @_eager
    def backward(ctx: Any, *directions: MaybeTensor) -> Any:
        inputs, grad_out, grad_lse = FORWARD.unpack(ctx.saved_tensors)
        tangents = Tangents(*directions)
        outputs = JvpOutputs(*FlashAttentionJvp.apply(*inputs, *tangents, ctx.options))
        gradients = FlashAttentionJvpBackward.apply(
            *(*inputs, *tangents, *outputs),
            *JvpCotangents(tout=grad_out, mu=grad_lse),
            (*BACKWARD.needs(ctx.needs_input_grad), *_NO_NEEDS),
            ctx.options,
        )
        of_inputs, _ = _split_gradients(gradients)
        of_cotangents = Cotangents(
            out=None if grad_out is None else outputs.tout,
            lse=None if grad_lse is None else outputs.mu,
        )
        return BACKWARD.gradients(
            {Inputs: of_inputs, Cotangents: of_cotangents}, len(ctx.needs_input_grad)
        )

    @staticmethod
    @_eager
    def jvp(ctx: Any, *argument_tangents: Any) -> Any:
        inputs, grad_out, grad_lse = FORWARD.unpack(ctx.saved_tensors)
        _, _, tcotangents, *_ = BACKWARD.unpack(argument_tangents)
        tangents = _tangents_of(argument_tangents)
        outputs = FlashAttentionJvp.apply(*inputs, *tangents, ctx.options)
        gradients = FlashAttentionJvpBackward.apply(
            *(*inputs, *tangents, *outputs),
            *JvpCotangents(tcotangents.out, tcotangents.lse, tout=grad_out, mu=grad_lse),
            (*ctx.needs, *_NO_NEEDS),
            ctx.options,
        )
        of_inputs, _ = _split_gradients(gradients)
        return tuple(of_inputs)


class FlashAttentionJvpBackward(_AttentionFunction):
    """The VJP of `FlashAttentionJvp`.

    (*inputs, *tangents, *outputs of T, grad_out, grad_lse, grad_tout, grad_mu, needs, options) →
    gradients of the inputs that have some, and of the tangents; those not needed are None.
    """

    signature = JVP_BACKWARD

    @staticmethod
    def forward(*arguments: Any) -> Any:
        of_inputs, of_tangents = ops.jvp_backward(*JVP_BACKWARD.unpack(arguments))
        return *of_inputs, *of_tangents

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(_THIRD_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_THIRD_DERIVATIVE)


_THIRD_DERIVATIVE = (
    "this needs a third derivative of attention, or a second one of its tangent, which the four "
    "attention primitives do not give: use `with jvp_attn.backend('math')`, which differentiates "
    "to any order at quadratic memory"
)


def _tangents_of(argument_tangents: tuple[Any, ...]) -> Tangents:
    """The tangents of the inputs, which come first among the tangents of all arguments."""
    inputs, *_ = FORWARD.unpack(argument_tangents)
    return Tangents(*inputs.primals)


def _split_gradients(gradients: tuple[MaybeTensor, ...]) -> tuple[Gradients, Gradients]:
    """The gradients of the inputs and of their tangents."""
    n = len(Gradients._fields)
    return Gradients(*gradients[:n]), Gradients(*gradients[n:])


def _mark_non_differentiable(ctx: Any, *outputs: MaybeTensor) -> None:
    ctx.mark_non_differentiable(*(x for x in outputs if x is not None))
