"""FlashAttention that every transform of torch.func and torch.autograd can differentiate."""

from importlib.metadata import version

from jvp_attn.backends import available_backends, backend, current_backend
from jvp_attn.functions import (
    FlashAttention,
    FlashAttentionBackward,
    FlashAttentionTangent,
    FlashAttentionTangentBackward,
)
from jvp_attn.interface import (
    flash_attn_jvp,
    flash_attn_varlen_jvp,
    flash_attn_with_tangent,
)
from jvp_attn.maps import AttentionOptions, Causal
from jvp_attn.merge import merge_attention
from jvp_attn.replacement import replace_sdpa
from jvp_attn.sdpa import scaled_dot_product_attention

__version__ = version("jvp-attn")

__all__ = [
    "AttentionOptions",
    "Causal",
    "FlashAttention",
    "FlashAttentionBackward",
    "FlashAttentionTangent",
    "FlashAttentionTangentBackward",
    "available_backends",
    "backend",
    "current_backend",
    "flash_attn_jvp",
    "flash_attn_varlen_jvp",
    "flash_attn_with_tangent",
    "merge_attention",
    "replace_sdpa",
    "scaled_dot_product_attention",
]
