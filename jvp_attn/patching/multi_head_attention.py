"""torch's `multi_head_attention_forward`, computed with this package's attention, or another.

A TorchFunctionMode is off while it handles a call, so it sees the call of that function but not the
attention inside. This module contains a copy of the function whose globals are those of torch with
our attention; it is a module because torch.compile looks up globals in the function's module.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F

from jvp_attn import sdpa

globals().update({name: x for name, x in vars(F).items() if not name.startswith("__")})
scaled_dot_product_attention = sdpa.scaled_dot_product_attention


def has_torch_function(tensors: object) -> bool:
    """Always False: modes have already handled the call."""
    return False


def _copy(variables: dict[str, Any]) -> Callable[..., Any]:
    copy = FunctionType(F.multi_head_attention_forward.__code__, variables)
    copy.__defaults__ = F.multi_head_attention_forward.__defaults__
    return copy


multi_head_attention_forward = _copy(globals())


def multi_head_attention_with(attention: Callable[..., Any]) -> Callable[..., Any]:
    """The function with another attention, of the signature of torch's.

    Raises, when it is called:
        NotImplementedError: need_weights=True, which computes the weights without calling the
            attention.
    """
    forward = _copy({**globals(), "scaled_dot_product_attention": attention})

    def checked(*args: Any, **kwargs: Any) -> Any:
        arguments = signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
        if arguments.get("need_weights", True):
            raise NotImplementedError(
                "multi-head attention with need_weights=True computes its weights itself, without "
                "the attention that replace_sdpa(attention=...) was given: pass need_weights=False"
            )
        return forward(*args, **kwargs)

    return checked
