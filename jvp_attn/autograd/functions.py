"""The derivative rules: autograd Functions over the four maps of `jvp_attn.types`.

    Function                               jvp rule     backward rule (VJP)
    F   FlashAttention                     T            B
    T   FlashAttentionJvp              raises       BT
    B   FlashAttentionBackward             BT           T and BT
    BT  FlashAttentionJvpBackward      raises       raises

The rules of B close the circle. With x = (q, k, v, mask):

    JVP of B along (tx, tdO)        = the x part of BT with dO := tdO, dtO := dO
    VJP of B against hx: for dO     = tO of T along hx
                         for x      = the x part of BT with dO := 0, dtO := dO

because <B, h> is the derivative of <dO, O> along h. Each rule takes g_lse along with dO and g_mu
along with dtO. Residuals (see `jvp_attn.types`) go from F and T to B and BT and have no derivative.

`.apply` takes what the maps take, tensors one by one, and works under torch.func transforms:

    inputs        q, k, v, mask, cu_seqlens_q, cu_seqlens_k
    tangents      tq, tk, tv, tmask
    outputs       out, lse, out_lo               of F
                  out, lse, tout, mu, out_lo, tout_lo      of T
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.autograd import Function

from jvp_attn.autograd import ops
from jvp_attn.autograd.vmap import vmap_attention
from jvp_attn.types import Cotangents, Inputs, JvpOutputs, Outputs, Tangents
from jvp_attn.validation import check_tangents

MaybeTensor = Tensor | None

_INPUTS, _TANGENTS = 6, 4
_PRIMALS = 4  # the inputs that have derivatives


class _AttentionFunction(Function):
    _masks: ClassVar[tuple[int, ...]] = (3,)  # the places of the mask and its tangent
    _needs: ClassVar[int | None] = None  # the place of what tells which gradients are needed

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        needs = () if cls._needs is None else arguments[cls._needs]
        return vmap_attention(
            cls.apply,
            info.batch_size,
            in_dims,
            arguments,
            cls._masks,
            mask_gradients=any(needs[3::4]),
        )


class FlashAttention(_AttentionFunction):
    """(*inputs, options) → (out, lse, out_lo), as `AttentionBackend.forward`."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *inputs, options = arguments
        return tuple(ops.forward(Inputs(*inputs), options))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors)
        _mark_as_constant(ctx, *output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: MaybeTensor, grad_lse: MaybeTensor, _: None) -> Any:
        needs = tuple(ctx.needs_input_grad[:_PRIMALS])
        gradients = FlashAttentionBackward.apply(
            *ctx.saved_tensors, grad_out, grad_lse, needs, ctx.options
        )
        return *gradients, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        inputs, along = Inputs(*ctx.saved_tensors[:_INPUTS]), Tangents(*tangents[:_PRIMALS])
        check_tangents(inputs, along)
        outputs = FlashAttentionJvp.apply(*inputs, *along, ctx.options)
        _, _, tout, mu, *_ = outputs
        return tout, mu, None


class FlashAttentionJvp(_AttentionFunction):
    """(*inputs, *tangents, options) → (out, lse, tout, mu, out_lo, tout_lo).

    Any tangent may be None.
    """

    _masks: ClassVar = (3, 9)

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *tensors, options = arguments
        inputs, tangents = Inputs(*tensors[:_INPUTS]), Tangents(*tensors[_INPUTS:])
        return tuple(ops.forward_jvp(inputs, tangents, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors, *output)
        _mark_as_constant(ctx, *output[4:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any,
        grad_out: MaybeTensor,
        grad_lse: MaybeTensor,
        grad_tout: MaybeTensor,
        grad_mu: MaybeTensor,
        *_: None,
    ) -> Any:
        tensors = ctx.saved_tensors
        inputs = tensors[:_INPUTS]
        needs = tuple(ctx.needs_input_grad[:_PRIMALS])
        if grad_tout is None and grad_mu is None:
            out, lse, _tout, _mu, out_lo, _tout_lo = tensors[_INPUTS + _TANGENTS :]
            gradients = FlashAttentionBackward.apply(
                *inputs, out, lse, out_lo, grad_out, grad_lse, needs, ctx.options
            )
            return *gradients, None, None, *_TANGENTS * (None,), None
        needs += tuple(ctx.needs_input_grad[_INPUTS : _INPUTS + _TANGENTS])
        gradients = FlashAttentionJvpBackward.apply(
            *tensors, grad_out, grad_lse, grad_tout, grad_mu, needs, ctx.options
        )
        return *gradients[:_PRIMALS], None, None, *gradients[_PRIMALS:], None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "the forward derivative of an attention tangent (jvp of jvp) is not implemented: "
            "differentiate the tangent in reverse mode, with torch.func.grad or .backward()"
        )


class FlashAttentionBackward(_AttentionFunction):
    """(*inputs, *outputs of F, grad_out, grad_lse, needs, options) → gradients of the inputs.

    A function of the inputs, grad_out and grad_lse: the outputs must be what `FlashAttention` gives
    for the inputs, and their share of a derivative is counted in that of the inputs.
    """

    _needs: ClassVar = 11

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *tensors, needs, options = arguments
        inputs, outputs = Inputs(*tensors[:6]), Outputs(*tensors[6:9])
        return tuple(ops.backward(inputs, outputs, Cotangents(*tensors[9:]), needs, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.needs, ctx.options = inputs
        saved = (*tensors[:_INPUTS], *tensors[9:])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *directions: MaybeTensor) -> Any:
        *inputs, grad_out, grad_lse = ctx.saved_tensors
        options = ctx.options
        outputs = FlashAttentionJvp.apply(*inputs, *directions, options)
        needs = (*ctx.needs_input_grad[:_PRIMALS], *_TANGENTS * (False,))
        gradients = FlashAttentionJvpBackward.apply(
            *inputs, *directions, *outputs, None, None, grad_out, grad_lse, needs, options
        )
        _, _, tout, mu, *_ = outputs
        grad_grad_out = None if grad_out is None else tout
        grad_grad_lse = None if grad_lse is None else mu
        return (
            *(*gradients[:_PRIMALS], None, None),
            *(None, None, None),
            *(grad_grad_out, grad_grad_lse),
            *(None, None),
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        *inputs, grad_out, grad_lse = ctx.saved_tensors
        along, tgrad_out, tgrad_lse = tangents[:_PRIMALS], *tangents[9:11]
        outputs = FlashAttentionJvp.apply(*inputs, *along, ctx.options)
        gradients = FlashAttentionJvpBackward.apply(
            *(*inputs, *along, *outputs),
            *(tgrad_out, tgrad_lse, grad_out, grad_lse),
            (*ctx.needs, *_TANGENTS * (False,)),
            ctx.options,
        )
        return gradients[:_PRIMALS]


class FlashAttentionJvpBackward(_AttentionFunction):
    """The VJP of `FlashAttentionJvp`.

    (*inputs, *tangents, *outputs of T, grad_out, grad_lse, grad_tout, grad_mu, needs, options) →
    gradients of the inputs that have some, and of the tangents; those not needed are None.
    """

    _masks: ClassVar = (3, 9)
    _needs: ClassVar = 20

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *tensors, needs, options = arguments
        gradients, tangent_gradients = ops.jvp_backward(
            Inputs(*tensors[:6]),
            Tangents(*tensors[6:10]),
            JvpOutputs(*tensors[10:16]),
            Cotangents(*tensors[16:]),
            needs,
            options,
        )
        return *gradients, *tangent_gradients

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
    "attention maps do not give: use `with jvp_attn.backend('math')`, which differentiates to any "
    "order at quadratic memory"
)


def _mark_as_constant(ctx: Any, *outputs: MaybeTensor) -> None:
    ctx.mark_non_differentiable(*(x for x in outputs if x is not None))
