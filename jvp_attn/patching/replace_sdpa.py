"""`replace_sdpa`: models that call torch's attention get this package's, without being changed."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from jvp_attn.patching.multi_head_attention import multi_head_attention_forward
from jvp_attn.patching.unsupported_attention import guard_libraries, refuse_attention
from jvp_attn.sdpa import scaled_dot_product_attention


class replace_sdpa(TorchFunctionMode):
    """Let `torch.nn.functional.scaled_dot_product_attention` be this package's, inside a block.

        with jvp_attn.replace_sdpa():
            out, out_tangent = torch.func.jvp(model, (x, t), (x_tangent, t_tangent))

    That holds for all code that the block runs in its thread, in transforms of torch.func and
    around them and under torch.compile too; backends that `torch.nn.attention.sdpa_kernel` asks for
    are ignored. torch.nn.MultiheadAttention and the layers of torch.nn.Transformer are included and
    do not take their fused fast paths; with need_weights=True they compute the weights themselves,
    at quadratic memory.

    Whatever was computed inside has its derivatives outside too. Only activation checkpointing
    computes anew, in the backward pass: call that inside of the block as well. Otherwise torch
    raises `torch.utils.checkpoint.CheckpointError`; with use_reentrant=True it takes the gradient
    of its own attention.

    Raises:
        NotImplementedError: inside the block, from attention that does not go through torch's
            function: FlexAttention, `torch.nn.attention.varlen`, operators of other packages, and
            what diffusers or transformers are told to call instead, such as
            attn_implementation="flash_attention_2". Attention inside of a torch.jit script is not
            seen; torch raises where a tangent enters it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Handle the call of a function of torch."""
        kwargs = kwargs or {}
        if func in _REPLACEMENTS:
            return _REPLACEMENTS[func](*args, **kwargs)
        if func in _CALLING_BACK:
            with self:
                return _CALLING_BACK[func](*args, **kwargs)
        if isinstance(func, OpOverload | OpOverloadPacket | HigherOrderOperator):
            refuse_attention(func)
        if not torch.compiler.is_compiling():
            guard_libraries(_is_active)
        return func(*args, **kwargs)


def _is_active() -> bool:
    return any(isinstance(mode, replace_sdpa) for mode in _get_current_function_mode_stack())


def _without_modes(function: Any) -> Callable[..., Any]:
    """The same function, but that it does not offer the call to modes."""
    checks = [name for name in function.__globals__ if name.startswith("has_torch_function")]
    never = {name: lambda *tensors: False for name in checks}
    copy = FunctionType(function.__code__, {**function.__globals__, **never})
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return copy


_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention: scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default: scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention_forward,
}

# A mode is off while it handles a call. Backward passes run what was checkpointed: back on there.
_CALLING_BACK = {
    function: _without_modes(function)
    for function in (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)
}
