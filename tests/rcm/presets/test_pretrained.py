"""The presets of pretrained networks: networks, data and settings of each, and short runs."""

import ast
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rcm import run_pretrained, train
from rcm.presets import PRESETS, config_from_settings
from rcm.presets.pretrained import PRETRAINED
from rcm.run import run
from rcm.time_sampling import LogNormal, ShiftedUniform, TimeDistribution
from rcm.training.config import PretrainedConfig

METHODS = ("rcm", "scm", "dmd", "dcm")
WAN = ["wan2.1-t2v-1.3b-released", "wan2.1-t2v-1.3b-paper"]
WAN += ["wan2.1-t2v-14b-released", "wan2.1-t2v-14b-paper"]
COSMOS = [f"cosmos-predict2-{size}-t2i" for size in ("0.6b", "2b", "14b")]
TINY = ["wan-tiny", "cosmos-tiny", "sd3-tiny"]
LARGE = [*WAN, *COSMOS, "sd3.5-medium"]

every_preset = pytest.mark.parametrize("name", [*LARGE, *TINY])
every_method = pytest.mark.parametrize("method", METHODS)


def config(name: str, method: str = "rcm") -> PretrainedConfig:
    found = PRESETS[name].config(method)
    assert isinstance(found, PretrainedConfig)
    return found


# ---- configs -----------------------------------------------------------------------------------


def test_these_are_all_presets() -> None:
    assert [*LARGE, *TINY] == list(PRETRAINED)


@every_preset
@every_method
def test_every_method_has_a_config_that_survives_json(name: str, method: str) -> None:
    made = config(name, method)
    stored = json.loads(json.dumps(asdict(made)))
    changed = {**stored, "seed": 7, "mesh": {**stored["mesh"], "ulysses": 4}}
    assert config_from_settings(stored) == made
    assert config_from_settings(changed) == replace(
        made, seed=7, mesh=replace(made.mesh, ulysses=4)
    )


@every_preset
def test_the_methods_share_the_settings_of_rcm(name: str) -> None:
    rcm = asdict(config(name).student)
    for method in METHODS:
        own = asdict(config(name, method).student)
        shared = own.keys() & rcm.keys()
        assert {key: own[key] for key in shared} == {key: rcm[key] for key in shared}
    dcm: Any = config(name, "dcm").student
    assert (dcm.teacher_steps, dcm.shift, dcm.solver) == (48, 5.0, "euler")


# Student's and critic's peak learning rates, iterations per update of the student, warm-up of the
# tangent, mean of log σ in the consistency loss, σ_max, batch, iterations and power of the EMA.
SETTINGS = {
    "wan2.1-t2v-1.3b-released": (2e-6, 4e-7, 5, 1000, 0.7, 80, 8, 10_000, 0.10),
    "wan2.1-t2v-1.3b-paper": (2e-6, 4e-7, 5, 1000, 0.7, 80, 256, 10_000, 0.05),
    "wan2.1-t2v-14b-released": (1e-6, 1e-7, 10, 0, 1.5, 200, 4, 4_000, 0.10),
    "wan2.1-t2v-14b-paper": (1e-6, 1e-7, 10, 200, 1.5, 200, 64, 4_000, 0.05),
    "cosmos-predict2-0.6b-t2i": (1e-6, 2e-7, 5, 0, -0.8, 80, 1024, 80_000, 0.05),
    "cosmos-predict2-2b-t2i": (1e-6, 2e-7, 5, 0, -0.8, 80, 512, 30_000, 0.05),
    "cosmos-predict2-14b-t2i": (1e-6, 2e-7, 5, 0, -0.8, 80, 256, 25_000, 0.05),
    "sd3.5-medium": (1e-6, 2e-7, 5, 0, -0.8, 80, 512, 30_000, 0.05),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_settings_of_published_runs(name: str) -> None:
    lr, critic_lr, every, warmup, mean, sigma_max, batch, iterations, ema = SETTINGS[name]
    rcm: Any = config(name).student
    assert (rcm.optimizer.lr, rcm.critic_optimizer.lr) == (lr, critic_lr)
    assert (rcm.student_every, rcm.tangent_warmup) == (every, warmup)
    assert rcm.times == LogNormal(mean=mean, std=1.6)
    assert (rcm.sigma_max, rcm.batch, rcm.iterations, rcm.ema.std) == (
        sigma_max,
        batch,
        iterations,
        ema,
    )
    is_wan = name in WAN
    score_times: TimeDistribution = LogNormal(mean=0.0, std=1.6)
    assert rcm.score_times == (ShiftedUniform(shift=5.0) if is_wan else score_times)
    assert rcm.guidance.scale == (5.0 if is_wan else 4.5)
    assert (rcm.consistency_weight, rcm.score_weight) == (100, 1)
    assert rcm.passes != "two"


@pytest.mark.parametrize("name", LARGE)
def test_large_networks_compute_in_bfloat16_on_gpus(name: str) -> None:
    made = config(name)
    assert (made.device, made.model.dtype, made.model.folder) == ("cuda", "bfloat16", None)
    assert not made.synthetic


# ---- networks and data -------------------------------------------------------------------------

PARAMETERS = {
    **dict.fromkeys(WAN[:2], 1.42e9),
    **dict.fromkeys(WAN[2:], 14e9),
    **dict(zip(COSMOS, (0.6e9, 2e9, 14e9), strict=True)),
    "sd3.5-medium": 2.2e9,
}


@pytest.mark.parametrize("name", LARGE)
def test_the_network_has_the_size_of_its_name_and_takes_the_data(name: str) -> None:
    made = config(name)
    network = made.model.build_on_meta()
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(PARAMETERS[name], rel=0.05)
    network.require_sample_shape(made.data.sample_shape)
    dim = 1024 if name in COSMOS else 4096
    expected = {"prompt_embeds": (made.data.text_length, dim)}
    if name == "sd3.5-medium":
        expected |= {"pooled_prompt_embeds": (2048,)}
    assert made.data.condition_sizes(network.condition_shapes) == expected


def pipeline_defaults(name: str) -> dict[str, Any]:
    """The defaults of a pipeline's call, from its source: importing it takes 10 seconds."""
    package = importlib.util.find_spec("diffusers")
    assert package is not None
    assert package.origin is not None
    source = (Path(package.origin).parent / "pipelines" / name).read_text(encoding="utf-8")
    (call,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "__call__"
    )
    arguments = call.args.args[-len(call.args.defaults) :]
    return {
        argument.arg: value.value
        for argument, value in zip(arguments, call.args.defaults, strict=True)
        if isinstance(value, ast.Constant)
    }


@pytest.mark.parametrize("name", WAN)
def test_wan_trains_on_the_videos_of_its_pipeline(name: str) -> None:
    defaults, data = pipeline_defaults("wan/pipeline_wan.py"), config(name).data
    frames = {81: 21, 77: 20}  # of the video and of its latents
    assert defaults["num_frames"] == 81
    assert data.sample_shape[1] == frames[81 if "14b" in name else 77]
    assert data.sample_shape[2:] == (defaults["height"] // 8, defaults["width"] // 8)
    assert data.text_length == defaults["max_sequence_length"]


@pytest.mark.parametrize("name", COSMOS)
def test_cosmos_trains_on_the_images_of_its_pipeline(name: str) -> None:
    defaults = pipeline_defaults("cosmos/pipeline_cosmos2_text2image.py")
    data = config(name).data
    assert data.sample_shape == (16, 1, defaults["height"] // 8, defaults["width"] // 8)
    assert data.text_length == defaults["max_sequence_length"]


def test_sd3_trains_on_the_images_and_texts_of_its_pipeline() -> None:
    defaults = pipeline_defaults("stable_diffusion_3/pipeline_stable_diffusion_3.py")
    made = config("sd3.5-medium")
    size = made.model.settings.get("sample_size", 128)  # the default size of the pipeline's images
    assert made.data.sample_shape == (16, size, size)
    assert made.data.text_length == 77 + defaults["max_sequence_length"]  # CLIP and T5


# ---- runs --------------------------------------------------------------------------------------


def three_iterations(folder: Path, name: str, method: str, **settings: Any) -> list[dict[str, Any]]:
    """The metrics of a run in which every loss occurs."""
    made = config(name, method)
    student = replace(made.student.shortened(), iterations=3, **settings)
    run(folder, replace(made, student=student, checkpoint_every=3))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _pairs() -> Iterator[Any]:
    """Every tiny preset with every method; a sample that covers both is not slow."""
    fast = {("wan-tiny", "rcm"), ("cosmos-tiny", "scm"), ("sd3-tiny", "dmd"), ("wan-tiny", "dcm")}
    for pair in product(TINY, METHODS):
        yield pytest.param(*pair, marks=() if pair in fast else pytest.mark.slow)


@pytest.mark.parametrize(("name", "method"), _pairs())
def test_a_tiny_preset_trains_with_every_method(
    name: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = three_iterations(tmp_path / "run", name, method)
    assert f"next: student ({method}), 3 iterations of " in capsys.readouterr().out
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    found = {key: value for line in lines for key, value in line.items() if key != "phase"}
    assert all(math.isfinite(value) for value in found.values())
    assert "skipped" not in found
    assert "grad_norm" in found
    assert ("critic_grad_norm" in found) == (method in ("rcm", "dmd"))


@pytest.mark.parametrize(
    ("passes", "expected"), [(None, "checkpoint_primal"), ("two", "checkpoint_jvp")]
)
def test_blocks_are_checkpointed_for_one_pass_or_two(
    passes: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = set()

    def noting(name: str) -> Callable[..., Tensor]:
        checkpoint: Callable[..., Tensor] = getattr(run_pretrained, name)

        def noted(block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            called.add(name)
            return checkpoint(block, *args, **kwargs)

        return noted

    for name in ("checkpoint_primal", "checkpoint_jvp"):
        monkeypatch.setattr(run_pretrained, name, noting(name))
    three_iterations(tmp_path / "run", "wan-tiny", "scm", passes=passes)
    assert called == {expected}


# ---- names -------------------------------------------------------------------------------------


def test_the_start_of_a_name_is_answered_with_the_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train.main(["wan2.1-t2v-1.3b"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: unknown preset 'wan2.1-t2v-1.3b'; perhaps you meant ")
    hint, names = message.split(". Presets: ")
    assert hint.endswith("'wan2.1-t2v-1.3b-released' or 'wan2.1-t2v-1.3b-paper'")
    assert names == ", ".join(PRESETS) + "\n"


def test_a_misspelt_name_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["wan-tinny"]) == 2
    assert "; perhaps you meant 'wan-tiny'. Presets: " in capsys.readouterr().err


def test_a_released_network_needs_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "--threads", "1", "--folder", str(tmp_path / "run")]
    threads = torch.get_num_threads()
    try:
        assert train.main([COSMOS[0], *options]) == 2
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().err == (
        f"error: {COSMOS[0]} has no folder of its model; give it with --model.folder\n"
    )
