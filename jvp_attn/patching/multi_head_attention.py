"""torch's `multi_head_attention_forward`, computed with this package's attention.

A TorchFunctionMode is off while it handles a call, so it sees the call of that function but not the
attention inside. This module contains a copy of the function whose globals are those of torch with
our attention; it is a module because torch.compile looks up globals in the function's module.
"""

from __future__ import annotations

from types import FunctionType

import torch.nn.functional as F

from jvp_attn import sdpa

globals().update({name: x for name, x in vars(F).items() if not name.startswith("__")})
scaled_dot_product_attention = sdpa.scaled_dot_product_attention


def has_torch_function(tensors: object) -> bool:
    """Always False: modes have already handled the call."""
    return False


multi_head_attention_forward = FunctionType(F.multi_head_attention_forward.__code__, globals())
multi_head_attention_forward.__defaults__ = F.multi_head_attention_forward.__defaults__
