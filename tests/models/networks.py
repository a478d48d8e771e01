"""Small networks of diffusers, timm and transformers, unmodified, with random weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.jvp_attn.attention_cases import randn


class Network(nn.Module):
    """A module of a library as a function of the inputs that have tangents.

    All weights are random: layers that a library initialises to zero would hide the layers before
    them.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Tensor], *inputs: Tensor) -> None:
        super().__init__()
        self.module, self.call, self.inputs = module, call, inputs
        for name, weight in module.named_parameters():
            fan_in = weight[0].numel() if weight.ndim > 1 else 10
            weight.data = randn(*weight.shape, seed=name) * fan_in**-0.5
        self.eval().double()

    def forward(self, *inputs: Tensor) -> Tensor:
        """(module, *inputs) → output."""
        return self.call(self.module, *inputs)


def _timesteps() -> Tensor:
    return torch.tensor([300.5, 700.5], dtype=torch.float64)


def _text(like: Tensor) -> Tensor:
    return randn(2, 5, 16, seed="text").to(like.dtype)


# ----------------------------------------------------------------------------
# diffusers. The sequence length is (size / 2)².


def wan(size: int = 8) -> Network:
    """Self-attention and cross-attention to a text."""
    from diffusers import WanTransformer3DModel

    module = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=8,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=64,
    )

    def call(module: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        return module(x, t, _text(x), return_dict=False)[0]

    return Network(module, call, randn(2, 4, 1, size, size, seed="x"), _timesteps())


def cosmos(size: int = 8) -> Network:
    """As in Cosmos-Predict2; the learned positions of Cosmos 1 are float32 only.

    Without the padding mask, which diffusers resizes with torchvision.
    """
    from diffusers import CosmosTransformer3DModel

    module = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, size, size),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )

    def call(module: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        return module(x, t, _text(x), fps=16, return_dict=False)[0]

    return Network(module, call, randn(2, 4, 1, size, size, seed="x"), _timesteps())


def sd3(size: int = 8) -> Network:
    """Joint attention to image and text, and a second attention to the image only."""
    from diffusers import SD3Transformer2DModel

    module = SD3Transformer2DModel(
        sample_size=size,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=size,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )

    def call(module: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        text = _text(x)
        return module(x, text, text.mean(1), t, return_dict=False)[0]

    return Network(module, call, randn(2, 4, size, size, seed="x"), _timesteps())


def dit(size: int = 8) -> Network:
    """An older network of diffusers, whose attention is an `Attention` with a processor."""
    from diffusers import DiTTransformer2DModel

    module = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=1,
        sample_size=size,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )

    def call(module: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        return module(x, t, torch.tensor([1, 2]), return_dict=False)[0]

    return Network(module, call, randn(2, 4, size, size, seed="x"), _timesteps())


# ----------------------------------------------------------------------------
# timm


def vit(size: int = 8) -> Network:
    """A VisionTransformer. timm is optional: it needs a torchvision built for this torch."""
    timm = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")

    module = timm.VisionTransformer(
        img_size=size, patch_size=2, embed_dim=16, depth=1, num_heads=2, num_classes=5, qk_norm=True
    )
    return Network(module, nn.Module.__call__, randn(2, 3, size, size, seed="x"))


# ----------------------------------------------------------------------------
# transformers


def bert(size: int = 8) -> Network:
    """With a padding mask."""
    seqlen = (size // 2) ** 2
    lengths = torch.tensor([[seqlen], [seqlen - 3]])
    visible = (torch.arange(seqlen) < lengths)[:, None, None, :]

    def call(module: nn.Module, x: Tensor) -> Tensor:
        return module(inputs_embeds=x, attention_mask=visible).last_hidden_state

    return Network(_bert(seqlen), call, randn(2, seqlen, 16, seed="x"))


def bert_with_empty_text(seqlen: int = 16) -> Network:
    """With an additive mask of finfo.min, on every key of the first text."""

    def call(module: nn.Module, x: Tensor) -> Tensor:
        mask = x.new_zeros(2, 1, seqlen, seqlen)
        mask[0] = max(torch.finfo(x.dtype).min, torch.finfo(torch.float32).min)
        mask[1, ..., seqlen - 3 :] = mask[0, 0, 0, 0]
        return module(inputs_embeds=x, attention_mask=mask).last_hidden_state

    return Network(_bert(seqlen), call, randn(2, seqlen, 16, seed="x"))


def _bert(seqlen: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=10,
            max_position_embeddings=seqlen,
        ),
        add_pooling_layer=False,
    )


def modern_bert() -> Network:
    """With a padding mask and local attention, so that some rows have no visible key."""
    from transformers import ModernBertConfig, ModernBertModel

    seqlen = 8
    module = ModernBertModel(
        ModernBertConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=10,
            local_attention=2,
            global_attn_every_n_layers=2,
            **{f"{name}_token_id": 0 for name in ("pad", "eos", "bos", "cls", "sep")},
        )
    )
    visible = torch.arange(seqlen) < torch.tensor([[seqlen], [seqlen - 4]])

    def call(module: nn.Module, x: Tensor) -> Tensor:
        return module(inputs_embeds=x, attention_mask=visible).last_hidden_state

    return Network(module, call, randn(2, seqlen, 16, seed="x"))


NETWORKS: tuple[Callable[..., Network], ...] = (wan, cosmos, sd3, dit, vit, bert)
