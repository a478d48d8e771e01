"""Choosing how a call is differentiated: dual outputs from one pass, Functions, or operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from jvp_attn.autograd import ops
from jvp_attn.autograd.duals import differentiable_inputs, unpack_duals
from jvp_attn.autograd.functions import FlashAttention, FlashAttentionJvp
from jvp_attn.backends import reference
from jvp_attn.transforms import depth, innermost
from jvp_attn.types import AttentionOptions, Inputs, JvpOutputs, Tangents
from jvp_attn.validation import check_lengths

MaybeTensor = Tensor | None


def differentiable_attention(
    inputs: Inputs, options: AttentionOptions
) -> tuple[Tensor, Tensor, MaybeTensor]:
    """(out, lse, lse_lo) of checked inputs, with every derivative.

    lse_lo may be None if the options do not request it, and has no derivative.
    """
    if options.backend == "math":
        check_lengths(inputs, options)
        return reference.attention(inputs, options)
    if not torch.compiler.is_compiling():
        return _eager_attention(inputs, options)
    primals, tangents = unpack_duals(inputs)
    has_tangent = any(t is not None for t in tangents)
    if not _can_be_captured(has_tangent):
        return _eager_attention(inputs, options)
    if not has_tangent:
        out, lse, _, lse_lo = ops.forward(inputs, options)
        return out, lse, lse_lo
    return _dual(ops.forward_jvp(primals, tangents, options))


def attention_with_tangent(
    inputs: Inputs, tangents: Tangents, options: AttentionOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor, MaybeTensor]:
    """(out, lse, tout, mu, lse_lo) of checked inputs and tangents, with every derivative.

    For lse_lo see `differentiable_attention`.
    """
    if options.backend == "math":
        check_lengths(inputs, options)
        return _math_attention_with_tangent(inputs, tangents, options)
    if not torch.compiler.is_compiling() or _is_transformed():
        return _eager_attention_with_tangent(inputs, tangents, options)
    out, lse, tout, mu, *_, lse_lo = ops.forward_jvp(inputs, tangents, options)
    return out, lse, tout, mu, lse_lo


def backward_may_follow(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may reach these tensors.

    Under torch.func transforms that is unknown, because an outer transform may ask for gradients.
    """
    if not torch.is_grad_enabled():
        return False
    return torch._C._are_functorch_transforms_active() or any(
        x.requires_grad for x in tensors if x is not None
    )


# ----------------------------------------------------------------------------
# Eager mode. The compiler must not trace these functions, even if it compiles their caller


_eager = torch.compiler.disable(
    reason="inside a compiled function, attention goes through torch.func.jvp but no other "
    "transform of torch.func, and through dual numbers only where they are made inside: compile "
    "without fullgraph=True, or apply the transform to what is compiled"
)


@_eager
def _eager_attention(
    inputs: Inputs, options: AttentionOptions
) -> tuple[Tensor, Tensor, MaybeTensor]:
    if _tangents_may_be_unpacked(inputs):
        primals, tangents = unpack_duals(inputs)
        if any(t is not None for t in tangents):
            if depth() == 1:
                # In the only transform, a jvp, primals and tangents are ordinary tensors inside of
                # wrappers. Without these the Function takes a fraction of the time.
                arguments = [None if x is None else innermost(x) for x in (*primals, *tangents)]
                with temporarily_clear_interpreter_stack():
                    outputs = FlashAttentionJvp.apply(*arguments, options)
            else:
                outputs = FlashAttentionJvp.apply(*primals, *tangents, options)
            return _dual(JvpOutputs(*outputs))
    out, lse, _, lse_lo = FlashAttention.apply(*inputs, options)
    return out, lse, lse_lo


@_eager
def _eager_attention_with_tangent(
    inputs: Inputs, tangents: Tangents, options: AttentionOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor, MaybeTensor]:
    out, lse, tout, mu, *_, lse_lo = FlashAttentionJvp.apply(*inputs, *tangents, options)
    return out, lse, tout, mu, lse_lo


def _tangents_may_be_unpacked(inputs: Inputs) -> bool:
    """Whether one Function may compute primal and tangent, as two ordinary results.

    With bare dual numbers and inputs that require grad it may not: autograd.grad inside the same
    dual level must carry tangents, but the tensors saved by that Function would have none. Then the
    jvp rule of `FlashAttention` computes the tangent. Under torch.func each transform has its own
    level, so only the innermost one matters, and what requires grad at that level.
    """
    functorch = torch._C._functorch
    transforms = functorch.get_interpreter_stack()
    if transforms:
        level = transforms[-1].level()
        return transforms[-1].key() == functorch.TransformType.Jvp and not any(
            x is not None and x.requires_grad and functorch.maybe_get_level(x) == level
            for x in inputs
        )
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs if x is not None))


def _dual(outputs: JvpOutputs) -> tuple[Tensor, Tensor, MaybeTensor]:
    out = fwAD.make_dual(outputs.out, outputs.tout)
    lse = fwAD.make_dual(outputs.lse, outputs.mu)
    return out, lse, outputs.lse_lo


def _math_attention_with_tangent(
    inputs: Inputs, tangents: Tangents, options: AttentionOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    primals = differentiable_inputs(inputs)
    directions = {name: getattr(tangents, name) for name in primals}

    def formula(values: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return reference.attention(inputs._replace(**values), options)

    outputs: Any = torch.func.jvp(
        formula,
        (primals,),
        ({x: torch.zeros_like(primals[x]) if t is None else t for x, t in directions.items()},),
    )
    (out, lse, lse_lo), (tout, mu, _) = outputs
    return out, lse, tout, mu, lse_lo


# ----------------------------------------------------------------------------
# Compiled. The operators' registered derivatives support a jvp inside the compiled function and
# .backward() outside of it. Other transforms break the graph or, with fullgraph=True, raise


@torch.compiler.assume_constant_result
def _can_be_captured(has_tangent: bool) -> bool:
    """Whether the registered derivatives suffice for the active transforms."""
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    if transforms:
        return [t.key() for t in transforms] == [torch._C._functorch.TransformType.Jvp]
    # The compiler hides the tangents of dual numbers that come from outside.
    return has_tangent or fwAD._current_level < 0


@torch.compiler.assume_constant_result
def _is_transformed() -> bool:
    return bool(torch._C._functorch.get_interpreter_stack()) or fwAD._current_level >= 0
