"""Image-to-video: a tiny Wan trains from a folder of its weights and a folder of latents."""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from rcm.data.check import main
from rcm.models.diffusers import DiffusersConfig
from rcm.presets.pretrained import PRETRAINED
from rcm.presets.tiny import SAMPLE_SHAPES, perturb, tiny
from rcm.run import run

SAMPLES, LATENTS = 4, SAMPLE_SHAPES["wan"]
CONDITION = {
    "prompt_embeds": (512, 16),
    "image_latents": (5, *LATENTS[1:]),
    "image_embeds": (257, 12),
}


def test_the_presets_of_14b_take_image_to_video_models(tmp_path: Path) -> None:
    stored = {"in_channels": 36, "out_channels": 16, "image_dim": 1280, "added_kv_proj_dim": 5120}
    stored |= {"_class_name": "WanTransformer3DModel"}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config = PRETRAINED["wan2.1-t2v-14b-released"].config("wan2.1-t2v-14b-released", "rcm")
    network = replace(config.model, folder=str(tmp_path)).build_on_meta()
    assert config.data.condition_sizes(network.condition_shapes) == {
        "prompt_embeds": (512, 4096),
        "image_latents": (20, 21, 60, 104),
        "image_embeds": (257, 1280),
    }


def write_weights(folder: Path) -> None:
    config = tiny("wan")
    image = {"in_channels": 9, "image_dim": 12, "added_kv_proj_dim": 48}
    torch.manual_seed(0)
    network = replace(config, settings={**config.settings, **image}).build()
    perturb(network)
    network.model.save_pretrained(folder)  # type: ignore[operator]


def write_data(folder: Path) -> None:
    folder.mkdir()
    shapes = {"latents": LATENTS, **CONDITION}
    tensors = {name: torch.randn(SAMPLES, *shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "00000.safetensors")
    negative = {"prompt_embeds": torch.randn(CONDITION["prompt_embeds"])}
    save_file(negative, folder / "negative.safetensors")


def test_a_tiny_wan_is_trained_on_images_to_start_from(tmp_path: Path) -> None:
    write_weights(tmp_path / "weights")
    write_data(tmp_path / "data")
    config = PRETRAINED["wan-tiny"].config("wan-tiny", "rcm")
    student = replace(config.student.shortened(), iterations=2)
    config = replace(
        config,
        synthetic=False,
        model=DiffusersConfig(architecture="wan", folder=str(tmp_path / "weights")),
        data=replace(config.data, folder=str(tmp_path / "data")),
        student=student,
        checkpoint_every=2,
    )
    assert student.guidance.active
    run(tmp_path / "run", config)
    lines = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        assert "skipped" not in line
        assert all(math.isfinite(value) for name, value in line.items() if name != "phase")


def test_the_checker_accepts_the_folder(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    shapes = {"latents": LATENTS, **CONDITION}
    sizes = {name: ",".join(map(str, shape)) for name, shape in shapes.items()}
    command = [str(tmp_path / "data"), "--latents", sizes.pop("latents")]
    for name, size in sizes.items():
        command += ["--condition", f"{name}={size}"]
    assert main(command) == 1
    assert main([*command, "--fixed", "image_latents", "--fixed", "image_embeds"]) == 0
