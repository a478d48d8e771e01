"""`replace_sdpa`: unmodified models that call torch's attention use this package's."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket, _compute_keyset
from torch.fx import Proxy
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from jvp_attn.patching.collectives import IN_PLACE, is_collective, raise_if_tangent
from jvp_attn.patching.multi_head_attention import (
    multi_head_attention_forward,
    raise_if_weights,
)
from jvp_attn.patching.unsupported_attention import guard_libraries, raise_if_attention
from jvp_attn.sdpa import scaled_dot_product_attention


class replace_sdpa(TorchFunctionMode):
    """Replace `torch.nn.functional.scaled_dot_product_attention` inside a block.

        with jvp_attn.replace_sdpa():
            out, out_tangent = torch.func.jvp(model, (x, t), (x_tangent, t_tangent))

    It applies to all code that the block runs in its thread, inside and outside of torch.func
    transforms and under torch.compile. It ignores `torch.nn.attention.sdpa_kernel`.
    torch.nn.MultiheadAttention and the layers of torch.nn.Transformer are included; their fused
    fast paths are off. With need_weights=True they compute the weights themselves, at quadratic
    memory.

    Results computed inside the block can be differentiated outside of it. `torch.utils.checkpoint`
    recomputes attention in the backward pass, so run the backward pass inside the block too.
    Otherwise torch raises `torch.utils.checkpoint.CheckpointError`, or with use_reentrant=True uses
    the gradient of its own attention. `jvp_attn.checkpoint_jvp` has no such restriction.

    Graphs that torch.export or torch.fx.symbolic_trace records inside the block contain this
    package's attention. Tracing with torch.jit.trace raises.

    Args:
        attention: what to call instead, with the signature of the default,
            `jvp_attn.scaled_dot_product_attention`. Context parallelism passes one that computes
            attention over the tokens of several ranks. In nested blocks the innermost counts.

    Raises:
        NotImplementedError: inside the block, from attention that bypasses
            `F.scaled_dot_product_attention`: FlexAttention, `torch.nn.attention.varlen`, operators
            of other packages, and other backends of diffusers or transformers, such as
            attn_implementation="flash_attention_2". Attention inside a torch.jit script is not
            detected; torch raises if a tangent enters it. From a collective of torch.distributed
            on a tensor with a tangent, which it would drop: collectives that write to an argument
            are detected with torch 2.13 or newer, methods of a ProcessGroup, such as
            `group.allreduce([x])`, are not. From torch.nn.MultiheadAttention with
            need_weights=True, if an attention other than the default is given.
    """

    def __init__(self, attention: Callable[..., Tensor] = scaled_dot_product_attention) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Handle a call of a torch function."""
        kwargs = kwargs or {}
        if func in _REPLACED:
            proxy = next((x for x in (*args, *kwargs.values()) if isinstance(x, Proxy)), None)
            if proxy is not None:
                return proxy.__torch_function__(self._in_graphs(func), types, args, kwargs)
            if func in _SDPA:
                return self.attention(*args, **kwargs)
            if self.attention is not scaled_dot_product_attention:
                raise_if_weights(args, kwargs)
        if func in _REENTERED:
            with self:
                return _REENTERED[func](*args, **kwargs)
        if func in IN_PLACE:
            raise_if_tangent(f"torch.distributed.{IN_PLACE[func]}", args, kwargs)
        elif isinstance(func, OpOverload | OpOverloadPacket | HigherOrderOperator):
            name = str(func)
            raise_if_attention(name)
            if is_collective(name):
                raise_if_tangent(name, args, kwargs)
        if not torch.compiler.is_compiling():
            guard_libraries(_is_active)
        elif func in _TRACED_AS_METHODS and getattr(type(args[0]), func.__name__) is func:
            return getattr(args[0], func.__name__)(*args[1:], **kwargs)
        return func(*args, **kwargs)

    def _in_graphs(self, func: Any) -> Callable[..., Any]:
        """What a symbolic trace records."""
        if func in _SDPA:
            return self.attention
        if self.attention is scaled_dot_product_attention:
            return _multi_head_attention
        raise NotImplementedError(
            "torch.fx.symbolic_trace of torch.nn.functional.multi_head_attention_forward is not "
            "supported inside replace_sdpa(attention=...) with another attention than the default"
        )


def _multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    """`F.multi_head_attention_forward` with this package's attention, for graphs."""
    with replace_sdpa():
        return F.multi_head_attention_forward(*args, **kwargs)


def _is_active() -> bool:
    return any(isinstance(mode, replace_sdpa) for mode in _get_current_function_mode_stack())


def _without_modes(function: Any) -> Callable[..., Any]:
    """A copy of the function that does not dispatch to modes."""
    checks = [name for name in function.__globals__ if name.startswith("has_torch_function")]
    never = {name: lambda *tensors: False for name in checks}
    copy = FunctionType(function.__code__, {**function.__globals__, **never})
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return copy


def _call_custom_function(function: Any, *args: Any, **kwargs: Any) -> Any:
    """`custom_function_call` under torch.func, without dispatch to modes."""
    keys = _compute_keyset(args, kwargs, custom_function_call.non_fallthrough_keys)
    key = keys.highestPriorityTypeId()
    return custom_function_call.dispatch(key, function, *args, **kwargs)


_SDPA = {
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
}
_REPLACED = {*_SDPA, F.multi_head_attention_forward}

# A mode is off while it handles a call. These calls may contain attention, so it must be on: the
# backward passes recompute checkpoints, and under torch.func a custom Function runs its rules.
_REENTERED: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: multi_head_attention_forward,
    **{
        function: _without_modes(function)
        for function in (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)
    },
    custom_function_call: _call_custom_function,
}

# torch.compile traces calls of these methods, but not of the functions that a mode gets for them. A
# subclass may override a method, which would then run twice.
_TRACED_AS_METHODS = (
    torch.Tensor.dim_order,
    torch.Tensor.resize,
    torch.Tensor.resize_as,
    torch.Tensor.unflatten,
)
