"""torch's `multi_head_attention_forward`, whose attention a TorchFunctionMode sees.

A mode is off while it handles a call, so it sees the call of that function but not the attention
inside. `replace_sdpa` calls this copy instead, with itself switched on again; it does not dispatch
to modes as a whole. It is in a module of its own because torch.compile looks up the globals of a
function in its module.
"""

from __future__ import annotations

from inspect import signature
from types import FunctionType
from typing import Any

import torch.nn.functional as F

globals().update({name: x for name, x in vars(F).items() if not name.startswith("__")})


def has_torch_function(tensors: object) -> bool:
    """Always False: modes have already handled the call."""
    return False


multi_head_attention_forward = FunctionType(F.multi_head_attention_forward.__code__, globals())
multi_head_attention_forward.__defaults__ = F.multi_head_attention_forward.__defaults__

_NEED_WEIGHTS = list(signature(F.multi_head_attention_forward).parameters).index("need_weights")


def raise_if_weights(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise if the arguments ask for attention weights, which the function computes itself.

    Raises:
        NotImplementedError: they do.
    """
    given = args[_NEED_WEIGHTS] if len(args) > _NEED_WEIGHTS else kwargs.get("need_weights", True)
    if given:
        raise NotImplementedError(
            "torch.nn.MultiheadAttention with need_weights=True computes its attention itself, not "
            "by the attention that replace_sdpa(attention=...) was given: pass need_weights=False"
        )
