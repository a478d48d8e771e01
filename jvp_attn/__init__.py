"""FlashAttention that every transform of torch.func and torch.autograd can differentiate."""

from importlib.metadata import version

import jvp_attn.torch_version  # noqa: F401  first, since the others need a new torch
from jvp_attn.autograd.functions import (
    FlashAttention,
    FlashAttentionBackward,
    FlashAttentionJvp,
    FlashAttentionJvpBackward,
)
from jvp_attn.backends.select import available_backends, backend, current_backend
from jvp_attn.checkpoint import checkpoint_jvp
from jvp_attn.flops import register_flop_formulas
from jvp_attn.interface import (
    flash_attn_jvp,
    flash_attn_varlen_jvp,
    flash_attn_with_tangent,
)
from jvp_attn.merge import merge_attention
from jvp_attn.one_pass import checkpoint_primal
from jvp_attn.patching.replace_sdpa import replace_sdpa
from jvp_attn.sdpa import scaled_dot_product_attention
from jvp_attn.types import AttentionOptions, Causal

register_flop_formulas()

__version__ = version("jvp-attn")

__all__ = [
    "AttentionOptions",
    "Causal",
    "FlashAttention",
    "FlashAttentionBackward",
    "FlashAttentionJvp",
    "FlashAttentionJvpBackward",
    "available_backends",
    "backend",
    "checkpoint_jvp",
    "checkpoint_primal",
    "current_backend",
    "flash_attn_jvp",
    "flash_attn_varlen_jvp",
    "flash_attn_with_tangent",
    "merge_attention",
    "replace_sdpa",
    "scaled_dot_product_attention",
]
