"""Transformers of diffusers from a folder, from settings, and on the meta device."""

import json
import math
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rcm.errors import RunError
from rcm.models.diffusers import DTYPES, Architecture, DiffusersConfig, load_class
from rcm.presets.tiny import SAMPLE_SHAPES, TEXT_LENGTH, tiny
from tests.rcm.models.backbones import ARCHITECTURES, example, tiny_backbone

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def saved(folder: Path, architecture: Architecture = "wan", **settings: Any) -> DiffusersConfig:
    """The config of a model whose config.json is in the folder."""
    folder.mkdir(parents=True)
    tiny_backbone(architecture, **settings).model.save_config(folder)
    return DiffusersConfig(architecture=architecture, folder=str(folder))


# ---- building ----------------------------------------------------------------------------------


@every_architecture
def test_new_weights_depend_on_the_seed_alone(architecture: Architecture) -> None:
    networks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        networks.append(tiny(architecture).build().state_dict())
    torch.testing.assert_close(networks[0], networks[1], rtol=0, atol=0)
    assert any(not torch.equal(networks[0][name], networks[2][name]) for name in networks[0])


@every_architecture
def test_a_network_on_meta_has_no_memory(architecture: Architecture) -> None:
    config = tiny(architecture)
    net, built = config.build_on_meta(), config.build()
    assert all(tensor.is_meta for tensor in (*net.parameters(), *net.buffers()))
    assert net.settings == built.settings
    assert {n: x.shape for n, x in net.state_dict().items()} == {
        n: x.shape for n, x in built.state_dict().items()
    }


@every_architecture
def test_what_no_file_contains_is_remade_exactly(architecture: Architecture) -> None:
    """All tensors of a network are its parameters, those in its state dict and these."""
    built, net = tiny_backbone(architecture), tiny(architecture).build_on_meta()
    before = torch.get_rng_state()
    remade = net.remake_buffers()
    assert torch.equal(torch.get_rng_state(), before)
    expected = dict(built.model.named_buffers())
    assert remade.keys() == expected.keys() - built.model.state_dict().keys()
    for name, tensor in remade.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.device == expected[name].device
        assert torch.equal(tensor, expected[name])
    for module in built.model.modules():
        assert not any(isinstance(value, torch.Tensor) for value in vars(module).values())


def test_the_tables_of_wan_are_remade_in_float32() -> None:
    net = tiny_backbone("wan")
    expected = net.model.rope.freqs_cos.clone()
    remade = net.bfloat16().remake_buffers()
    assert remade.keys() == {"rope.freqs_cos", "rope.freqs_sin"}
    assert torch.equal(remade["rope.freqs_cos"], expected)


@every_architecture
def test_a_network_on_meta_with_loaded_weights_is_the_network(architecture: Architecture) -> None:
    built, net = tiny_backbone(architecture), tiny(architecture).build_on_meta()
    remade = net.remake_buffers()
    net.to_empty(device="cpu")
    net.load_state_dict(built.state_dict())
    for name, tensor in remade.items():
        net.model.get_buffer(name).copy_(tensor)
    inputs = example(architecture)
    assert torch.equal(net(*inputs), built(*inputs))


RELEASED: dict[str, tuple[Architecture, dict[str, Any], int]] = {
    "Wan2.1-T2V-1.3B": (
        "wan",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        1_418_996_800,
    ),
    "Wan2.1-I2V-14B": (
        "wan",
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        16_394_878_784,
    ),
    "Wan2.2-TI2V-5B": (
        "wan",
        {
            "in_channels": 48,
            "out_channels": 48,
            "num_attention_heads": 24,
            "ffn_dim": 14336,
            "num_layers": 30,
        },
        4_999_787_712,
    ),
    "Cosmos-Predict2-2B-Text2Image": (
        "cosmos",
        {"num_attention_heads": 16, "extra_pos_embed_type": None},
        1_956_405_248,
    ),
    "stable-diffusion-3.5-medium": (
        "sd3",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        2_243_171_520,
    ),
    "FLUX.1-dev": ("flux", {"guidance_embeds": True}, 11_901_408_320),
}


@pytest.mark.parametrize(
    ("architecture", "settings", "parameters"), RELEASED.values(), ids=RELEASED
)
def test_a_released_model_is_supported_and_has_its_size(
    architecture: Architecture, settings: dict[str, Any], parameters: int
) -> None:
    net = DiffusersConfig(architecture=architecture, settings=settings).build_on_meta()
    assert sum(p.numel() for p in net.parameters()) == parameters


@every_architecture
@pytest.mark.parametrize("heads", [3, 4])
def test_2_does_not_divide_the_tokens_of_a_tiny_model(
    architecture: Architecture, heads: int
) -> None:
    net = tiny(architecture, heads=heads).build_on_meta()
    assert net.settings["num_attention_heads"] == heads
    sizes = zip(SAMPLE_SHAPES[architecture][1:], net.sample_spec.patch, strict=True)
    assert math.prod(size // patch for size, patch in sizes) % 2 == 1
    assert TEXT_LENGTH % 2 == 1


# ---- folders -----------------------------------------------------------------------------------


@every_architecture
def test_a_folder_says_the_settings(architecture: Architecture, tmp_path: Path) -> None:
    config = saved(tmp_path / "model", architecture, num_layers=3)
    net = config.build_on_meta()
    assert net.settings["num_layers"] == 3
    expected = tiny_backbone(architecture, num_layers=3)
    assert {n: x.shape for n, x in net.state_dict().items()} == {
        n: x.shape for n, x in expected.state_dict().items()
    }
    inputs = example(architecture)
    net = config.build()
    assert net(*inputs).shape == inputs[0].shape


def test_a_folder_of_a_pipeline(tmp_path: Path) -> None:
    saved(tmp_path / "pipeline" / "transformer")
    config = DiffusersConfig(architecture="wan", folder=str(tmp_path / "pipeline"))
    assert config.model_folder() == tmp_path / "pipeline" / "transformer"
    assert config.build_on_meta().settings["text_dim"] == 16


def test_a_pipeline_of_two_models_raises(tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        saved(tmp_path / "pipeline" / name)
    config = DiffusersConfig(architecture="wan", folder=str(tmp_path / "pipeline"))
    with pytest.raises(RunError, match=r"of 2 transformers; .*transformer or .*transformer_2"):
        config.build_on_meta()


def test_a_folder_with_another_class_raises(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "sd3").folder
    config = DiffusersConfig(architecture="wan", folder=folder)
    expected = "is of a SD3Transformer2DModel; give the folder of a WanTransformer3DModel"
    with pytest.raises(RunError, match=expected):
        config.build_on_meta()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has neither config.json nor transformer/config.json"),
        ({"config.json": "{"}, "config.json cannot be read: "),
        ({"config.json": "[1]"}, "config.json is not a JSON object"),
        ({"config.json": "{}"}, "is of a None; give the folder"),
    ],
)
def test_a_wrong_folder_raises(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=message):
        DiffusersConfig(architecture="wan", folder=str(tmp_path)).build_on_meta()


def test_a_missing_folder_raises(tmp_path: Path) -> None:
    config = DiffusersConfig(architecture="wan", folder=str(tmp_path / "absent"))
    with pytest.raises(RunError, match="absent is not a folder; give that of a WanTransformer3DM"):
        config.build_on_meta()
    with pytest.raises(RunError, match="the wan model has no folder; its weights are needed"):
        tiny("wan").model_folder()


def test_a_folder_that_disagrees_with_the_settings_raises(tmp_path: Path) -> None:
    config = saved(tmp_path / "model", num_layers=3)
    assert replace(config, settings={"num_layers": 3, "patch_size": [1, 2, 2]}).build_on_meta()
    with pytest.raises(RunError, match="has num_layers = 3; this preset's model has 2"):
        replace(config, settings={"num_layers": 2}).build_on_meta()


# ---- settings ----------------------------------------------------------------------------------


@every_architecture
def test_a_config_is_itself_after_a_round_trip_through_json(architecture: Architecture) -> None:
    config = tiny(architecture)
    assert DiffusersConfig(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_reaches_the_network(dtype: str) -> None:
    net = replace(tiny("wan"), dtype=dtype).build()  # type: ignore[arg-type]
    assert net.dtype == DTYPES[dtype]
    assert all(p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"architecture": "unet"}, ValueError, "'unet'; it must be one of wan, cosmos, sd3, flux"),
        ({"dtype": "float16"}, ValueError, "'float16'; it must be one of float32, bfloat16"),
        ({"folder": 3}, TypeError, "folder is 3; it must be a path"),
        ({"settings": {}}, ValueError, "neither a folder nor settings; give its folder"),
        ({"settings": {"a": object}}, TypeError, "a is .*; settings are numbers"),
        ({"settings": 3, "folder": "x"}, TypeError, "settings is 3; it must be a dict"),
    ],
)
def test_an_invalid_setting_raises(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        replace(tiny("wan"), **settings)


def test_an_unknown_argument_of_the_class_raises() -> None:
    config = DiffusersConfig(architecture="wan", settings={"depth": 3, "num_layers": 2})
    with pytest.raises(ValueError, match="settings has depth, which WanTransformer3DModel does"):
        config.build()


@pytest.mark.parametrize("version", ["0.34.0", "0.9.1"])
def test_an_older_diffusers_raises(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    monkeypatch.setattr(diffusers, "__version__", version)
    message = f"needs diffusers 0.35 or newer, but diffusers {version} is installed; run pip inst"
    with pytest.raises(ImportError, match=re.escape(message)):
        tiny("wan").build()


def test_without_diffusers_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ImportError, match=r"has no WanTransformer9DModel; run pip install --upg"):
        load_class("WanTransformer9DModel")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"needs diffusers, .* run pip install '\.\[diffusers\]'"):
        tiny("wan").build()
