"""The derivative rules: autograd Functions over the four maps of `jvp_attn.maps`.

    Function                               jvp rule     backward rule (VJP)
    F   FlashAttention                     T            B
    T   FlashAttentionTangent              raises       BT
    B   FlashAttentionBackward             BT           T and BT
    BT  FlashAttentionTangentBackward      raises       raises

The rules of B close the circle:

    JVP of B along (tq, tk, tv, tgO)       = the (q, k, v) part of BT with gO := tgO, gT := gO
    VJP of B against (hq, hk, hv): for gO  = tO of T along (hq, hk, hv)
                          for q, k, v      = the (q, k, v) part of BT with gO := 0, gT := gO

because <B, h> is the derivative of <gO, O> along h. Each rule takes g_lse along with gO and g_mu
along with gT. Residuals (see `jvp_attn.maps`) go from F and T to B and BT and have no derivative.
All Functions work under torch.func transforms through `.apply`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from jvp_attn.backends import maps_of
from jvp_attn.maps import AttentionOptions, Gradients, Outputs, TangentOutputs

MaybeTensor = Tensor | None


class _BatchedFunction(Function):
    """vmap by folding: every tensor argument and result has its batch in front."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def fold(x: Any, in_dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            x = x.expand(size, *x.shape) if in_dim is None else x.movedim(in_dim, 0)
            return x.flatten(0, 1)

        folded = [fold(x, in_dim) for x, in_dim in zip(args, in_dims, strict=True)]
        outputs = cls.apply(*folded)
        unfolded = tuple(
            None if y is None else y.unflatten(0, (size, y.shape[0] // size)) for y in outputs
        )
        return unfolded, tuple(None if y is None else 0 for y in outputs)


def _mark_as_constant(ctx: Any, *outputs: MaybeTensor) -> None:
    ctx.mark_non_differentiable(*(x for x in outputs if x is not None))


class FlashAttention(_BatchedFunction):
    """(q, k, v, options) → (out, lse, out_residual), as `jvp_attn.maps.AttentionMaps.forward`."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Outputs:
        return maps_of(options.backend).forward(q, k, v, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, ctx.options = inputs
        ctx.save_for_backward(q, k, v, *output)
        ctx.save_for_forward(q, k, v)
        _mark_as_constant(ctx, *output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: MaybeTensor, grad_lse: MaybeTensor, _: None) -> Any:
        grads = FlashAttentionBackward.apply(*ctx.saved_tensors, grad_out, grad_lse, ctx.options)
        return *grads, None

    @staticmethod
    def jvp(ctx: Any, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor, _: None) -> Any:
        q, k, v, *_ = ctx.saved_tensors
        _, _, tout, mu, *_ = FlashAttentionTangent.apply(q, k, v, tq, tk, tv, ctx.options)
        return tout, mu, None


class FlashAttentionTangent(_BatchedFunction):
    """(q, k, v, tq, tk, tv, options) → (out, lse, tout, mu, out_residual, tout_residual).

    Any tangent may be None.
    """

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tq: MaybeTensor,
        tk: MaybeTensor,
        tv: MaybeTensor,
        options: AttentionOptions,
    ) -> TangentOutputs:
        return maps_of(options.backend).forward_tangent(q, k, v, tq, tk, tv, options)

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
        if grad_tout is None and grad_mu is None:
            q, k, v, _tq, _tk, _tv, out, lse, _tout, _mu, out_residual, _ = tensors
            grads = FlashAttentionBackward.apply(
                q, k, v, out, lse, out_residual, grad_out, grad_lse, ctx.options
            )
            return *grads, None, None, None, None
        grads = FlashAttentionTangentBackward.apply(
            *tensors,
            *(grad_out, grad_lse, grad_tout, grad_mu),
            ctx.options,
            tuple(ctx.needs_input_grad[3:6]),
        )
        return *grads, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "the forward derivative of an attention tangent (jvp of jvp) is not implemented: "
            "differentiate the tangent in reverse mode, with torch.func.grad or .backward()"
        )


class FlashAttentionBackward(_BatchedFunction):
    """(q, k, v, out, lse, out_residual, grad_out, grad_lse, options) → gradients of (q, k, v).

    A function of q, k, v, grad_out and grad_lse: the others must be what `FlashAttention` returns
    for q, k, v, and their share of a derivative is counted in that of q, k, v.
    """

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        out_residual: MaybeTensor,
        grad_out: MaybeTensor,
        grad_lse: MaybeTensor,
        options: AttentionOptions,
    ) -> Gradients:
        return maps_of(options.backend).backward(
            q, k, v, out, lse, out_residual, grad_out, grad_lse, options
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, _out, _lse, _residual, grad_out, grad_lse, ctx.options = inputs
        ctx.save_for_backward(q, k, v, grad_out, grad_lse)
        ctx.save_for_forward(q, k, v, grad_out, grad_lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, hq: MaybeTensor, hk: MaybeTensor, hv: MaybeTensor) -> Any:
        q, k, v, grad_out, grad_lse = ctx.saved_tensors
        options = ctx.options
        outputs = FlashAttentionTangent.apply(q, k, v, hq, hk, hv, options)
        gq, gk, gv, *_ = FlashAttentionTangentBackward.apply(
            *(q, k, v, hq, hk, hv, *outputs),
            *(None, None, grad_out, grad_lse),
            options,
            (False, False, False),
        )
        _, _, tout, mu, *_ = outputs
        grad_grad_out = None if grad_out is None else tout
        grad_grad_lse = None if grad_lse is None else mu
        return gq, gk, gv, None, None, None, grad_grad_out, grad_grad_lse, None

    @staticmethod
    def jvp(
        ctx: Any,
        tq: MaybeTensor,
        tk: MaybeTensor,
        tv: MaybeTensor,
        _tout: MaybeTensor,
        _tlse: MaybeTensor,
        _tresidual: MaybeTensor,
        tgrad_out: MaybeTensor,
        tgrad_lse: MaybeTensor,
        _: None,
    ) -> Any:
        q, k, v, grad_out, grad_lse = ctx.saved_tensors
        options = ctx.options
        outputs = FlashAttentionTangent.apply(q, k, v, tq, tk, tv, options)
        gq, gk, gv, *_ = FlashAttentionTangentBackward.apply(
            *(q, k, v, tq, tk, tv, *outputs),
            *(tgrad_out, tgrad_lse, grad_out, grad_lse),
            options,
            (False, False, False),
        )
        return gq, gk, gv


class FlashAttentionTangentBackward(_BatchedFunction):
    """The VJP of `FlashAttentionTangent`: its inputs, outputs and their cotangents → six gradients.

    Gradients of tq, tk, tv that are not needed are None.
    """

    @staticmethod
    def forward(*inputs: Any) -> Any:
        *_tensors, options, _needs_tangent_grads = inputs
        gradients, tangent_gradients = maps_of(options.backend).tangent_backward(*inputs)
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
