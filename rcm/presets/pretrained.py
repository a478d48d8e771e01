"""Presets that distil pretrained networks of diffusers, and tiny ones with random weights.

`-released` and `-paper` have the settings of rCM's published runs (rcm/presets/released.py).
sd3.5-medium is not among these; it has the settings of Cosmos-Predict2 at 2B parameters. No run
with these presets has been finished yet. The tiny presets run everything on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from rcm.data.latents import LatentsConfig
from rcm.methods.dcm import DCM
from rcm.methods.dmd import DMD
from rcm.methods.rcm import RCM
from rcm.methods.scm import SCM
from rcm.models.diffusers import Architecture, DiffusersConfig
from rcm.presets.released import METHODS
from rcm.presets.tiny import SAMPLE_SHAPES, TEXT_LENGTH, tiny
from rcm.training.config import PretrainedConfig
from rcm.training.method import Distillation
from rcm.training.optimization import OptimizerConfig


@dataclass(frozen=True)
class Pretrained:
    """What one preset distils."""

    model: DiffusersConfig
    data: LatentsConfig
    rcm: RCM
    synthetic: bool = False
    default_method: str = "rcm"

    @property
    def methods(self) -> dict[str, Distillation]:
        """rCM, and the methods that share its settings."""
        return {
            "rcm": self.rcm,
            "scm": SCM(**_shared(SCM, self.rcm)),
            "dmd": DMD(**_shared(DMD, self.rcm)),
            "dcm": DCM(**_shared(DCM, self.rcm), teacher_steps=48, shift=5.0),
        }

    def config(self, preset: str, method: str) -> PretrainedConfig:
        return PretrainedConfig(
            preset=preset,
            method=method,
            synthetic=self.synthetic,
            device="cpu" if self.synthetic else "cuda",
            threads=1 if self.synthetic else 8,
            data=self.data,
            model=self.model,
            student=self.methods[method],
            checkpoint_every=5 if self.synthetic else 200,
        )


def _shared(kind: type[Distillation], settings: RCM) -> dict[str, Any]:
    """The settings of rCM that another method has too."""
    names = {field.name for field in fields(kind)} & {field.name for field in fields(settings)}
    return {name: getattr(settings, name) for name in names}


def _network(architecture: Architecture, **settings: Any) -> DiffusersConfig:
    return DiffusersConfig(architecture=architecture, settings=settings, dtype="bfloat16")


def _cosmos(**settings: Any) -> DiffusersConfig:
    """What all text-to-image models of Cosmos-Predict2 have in common."""
    rope_scale = (1.0, 4.0, 4.0)
    return _network("cosmos", rope_scale=rope_scale, extra_pos_embed_type=None, **settings)


# ---- networks and their samples ----------------------------------------------------------------

# The folder's config.json must agree with these arguments.
WAN_1_3B = _network("wan", num_layers=30, num_attention_heads=12, ffn_dim=8960)
WAN_14B = _network("wan", num_layers=40, num_attention_heads=40, ffn_dim=13824)
COSMOS_0_6B = _cosmos(num_layers=20, num_attention_heads=20, attention_head_dim=64)
COSMOS_2B = _cosmos(num_layers=28, num_attention_heads=16)
COSMOS_14B = _cosmos(num_layers=36, num_attention_heads=40)
SD3_5_MEDIUM = _network(
    "sd3",
    num_layers=24,
    num_attention_heads=24,
    caption_projection_dim=1536,
    pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)),
    qk_norm="rms_norm",
)

# 480p; 77 video frames are 20 latent frames and 81 are 21, as in rCM's code.
WAN_77 = LatentsConfig(sample_shape=(16, 20, 60, 104), text_length=512)
WAN_81 = LatentsConfig(sample_shape=(16, 21, 60, 104), text_length=512)
COSMOS = LatentsConfig(sample_shape=(16, 1, 96, 170), text_length=512)  # 1360×768
SD3 = LatentsConfig(sample_shape=(16, 128, 128), text_length=333)  # 77 of CLIP and 256 of T5


def _tiny(architecture: Architecture, released: str) -> Pretrained:
    """A tiny network with a short run of the same kind as a released one."""
    optimizer = OptimizerConfig(lr=1e-4, schedule="constant", betas=(0.0, 0.999), nonfinite="skip")
    method = replace(
        METHODS[released],
        iterations=20,
        batch=4,
        optimizer=optimizer,
        critic_optimizer=optimizer,
        tangent_warmup=4,
        student_every=2,
    )
    data = LatentsConfig(
        sample_shape=SAMPLE_SHAPES[architecture],
        text_length=TEXT_LENGTH,
    )
    return Pretrained(tiny(architecture), data, method, synthetic=True)


PRETRAINED: Mapping[str, Pretrained] = {
    "wan2.1-t2v-1.3b-released": Pretrained(WAN_1_3B, WAN_77, METHODS["wan-1.3b-released"]),
    "wan2.1-t2v-1.3b-paper": Pretrained(WAN_1_3B, WAN_77, METHODS["wan-1.3b-paper"]),
    "wan2.1-t2v-14b-released": Pretrained(WAN_14B, WAN_81, METHODS["wan-14b-released"]),
    "wan2.1-t2v-14b-paper": Pretrained(WAN_14B, WAN_81, METHODS["wan-14b-paper"]),
    "cosmos-predict2-0.6b-t2i": Pretrained(COSMOS_0_6B, COSMOS, METHODS["cosmos-0.6b-paper"]),
    "cosmos-predict2-2b-t2i": Pretrained(COSMOS_2B, COSMOS, METHODS["cosmos-2b-paper"]),
    "cosmos-predict2-14b-t2i": Pretrained(COSMOS_14B, COSMOS, METHODS["cosmos-14b-paper"]),
    "sd3.5-medium": Pretrained(SD3_5_MEDIUM, SD3, METHODS["cosmos-2b-paper"]),
    "wan-tiny": _tiny("wan", "wan-1.3b-released"),
    "cosmos-tiny": _tiny("cosmos", "cosmos-2b-paper"),
    "sd3-tiny": _tiny("sd3", "cosmos-2b-paper"),
}
