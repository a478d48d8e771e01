"""torch's `multi_head_attention_forward`, computed with this package's attention.

A TorchFunctionMode sees the call of that function but not the attention inside, for a mode is off
while it handles a call. So here is the same code again, in a module of its own: torch.compile looks
up there what the code's names mean.
"""

from __future__ import annotations

from types import FunctionType

import torch.nn.functional as F

from jvp_attn import sdpa

globals().update({name: x for name, x in vars(F).items() if not name.startswith("__")})
scaled_dot_product_attention = sdpa.scaled_dot_product_attention


def has_torch_function(tensors: object) -> bool:
    """Whether to offer the call to modes: not a second time."""
    return False


multi_head_attention_forward = FunctionType(F.multi_head_attention_forward.__code__, globals())
multi_head_attention_forward.__defaults__ = F.multi_head_attention_forward.__defaults__
