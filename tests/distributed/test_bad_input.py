"""A wrong setting or file ends `python -m rcm.train` with one line that says what to do.

The exit status is 2 for an option and 1 for anything else. No rank hangs, and what can be found
before a run starts leaves no run folder.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rcm import train
from rcm.data.latents import NEGATIVE
from rcm.data.random_latents import write_random_latents
from rcm.models.adapter import Condition
from rcm.models.diffusers import ADAPTERS, Architecture
from rcm.models.wan import WAN
from rcm.presets.tiny import TEXT_DIM, TEXT_LENGTH, VIDEO, perturb, tiny
from tests.distributed.launched_training import (
    ForkedRanks,
    TorchrunRanks,
    finished_checkpoints,
    iterations,
)

pytestmark = pytest.mark.xdist_group("ranks")

SAMPLES = 8
CONDITION = {"prompt_embeds": (TEXT_LENGTH, TEXT_DIM)}
NEW = ("--student.iterations", "2", "--checkpoint-every", "1")


def save_model(folder: Path, architecture: Architecture = "wan", layers: int = 2) -> Path:
    """A pretrained folder with several files of bfloat16 weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = tiny(architecture, layers=layers).build()
        perturb(network)
    network.model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("models") / "wan")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_random_latents(folder, SAMPLES, VIDEO, CONDITION)
    return folder


@pytest.fixture
def model(wan: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(wan, tmp_path / "model"))


@pytest.fixture
def data(latents: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(latents, tmp_path / "data"))


@pytest.fixture
def start(
    wan: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> Callable[..., tuple[int, str]]:
    """Train in this process, with a good model and good data unless other options are given."""
    monkeypatch.chdir(tmp_path)

    def started(*options: str, preset: str = "wan-tiny") -> tuple[int, str]:
        folders = ["--folder", "run", "--model.folder", str(wan), "--data.folder", str(latents)]
        code = train.main([preset, *folders, *NEW, *options])
        text: str = capsys.readouterr().err
        assert text.count("\n") == (code != 0), text
        return code, text

    return started


def test_a_folder_of_a_model_and_a_folder_of_latents(
    start: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    assert start() == (0, "")
    assert sorted(finished_checkpoints(tmp_path / "run")) == [1, 2]


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method meanflow", "unknown method 'meanflow'. Methods: rcm, scm, dmd, dcm"),
        ("--mesh.ulysses 2", "2 ranks, but the run has 1; change --mesh.* or torchrun's"),
        ("--student.batch 3 --accumulation 2", "--student.batch is 3; it must be a multiple of 2"),
        ("--data.sample-shape 5 3 6 10", "with 4 channels and other sizes divisible by (1, 2, 2)"),
        ("--data.sample-shape 4 3 7 10", "--data.sample-shape does not fit the model: samples"),
        ("--data.sample-shape 4 6 10", "takes (channels, frames, height, width)"),
        ("--student.start runs/a", "--student.start is 'runs/a'; it must be 'teacher', because"),
        ("--model.dtype float16", "invalid choice 'float16' for argument '--model.dtype'"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_an_option(
    start: Callable[..., tuple[int, str]],
    tmp_path: Path,
    options: str,
    message: str,
    dry_run: bool,
) -> None:
    code, error = start(*options.split(), *(["--dry-run"] if dry_run else []))
    assert (code, message in error) == (2, True), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", ["wan2.1-t2v-1.3b-released", "sd3.5-medium"])
@pytest.mark.parametrize("option", ["--dry-run", "--seed=1"])
@pytest.mark.parametrize("name", ["model", "data"])
def test_a_preset_without_its_folders(
    preset: str,
    option: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--model.folder", "x"] if name == "data" else []
    assert train.main([preset, "--device", "cpu", option, *given]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {preset} has no folder of its {name}; give it with --{name}.folder\n"
    assert not list(tmp_path.iterdir())


# ---- the folder of the model -------------------------------------------------------------------


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def garble(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "files that {index} lists are missing: {shard}"),
        (truncate, "{shard}"),
        (garble, "{shard}"),
    ],
)
def test_a_file_of_the_model(
    start: Callable[..., tuple[int, str]],
    tmp_path: Path,
    model: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    shard = sorted(model.glob("*.safetensors"))[1]
    damage(shard)
    [index] = model.glob("*.index.json")
    code, error = start("--model.folder", str(model))
    assert (code, message.format(index=index, shard=shard.name) in error) == (1, True), error
    assert not (tmp_path / "run").exists()


def test_a_missing_model(start: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, error = start("--model.folder", "missing")
    assert (code, error) == (
        1,
        "error: missing is not a folder; give that of a WanTransformer3DModel\n",
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_model(start: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    code, error = start("--model.folder", "other")
    assert code == 1
    assert "other has neither config.json nor transformer/config.json; give the folder" in error


def test_another_class_of_model(start: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, error = start("--model.folder", str(save_model(tmp_path / "sd3", "sd3")))
    assert code == 1
    assert "is of a SD3Transformer2DModel; give the folder of a WanTransformer3DModel" in error
    assert not (tmp_path / "run").exists()


def test_another_size_of_model(start: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, error = start("--model.folder", str(save_model(tmp_path / "small", layers=1)))
    assert code == 1
    assert "num_layers = 1; this preset's model has 2" in error


# ---- data --------------------------------------------------------------------------------------


def change(folder: Path, name: str, changed: Callable[[Tensor], Tensor]) -> None:
    """Change a tensor of the only shard."""
    [path] = set(folder.glob("*.safetensors")) - {folder / NEGATIVE}
    tensors = load_file(path)
    tensors[name] = changed(tensors[name])
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "data is not a folder"),
        (
            lambda data: (data / "00000.safetensors").unlink(),
            "data has no shards: no *.safetensors",
        ),
        (lambda data: (data / NEGATIVE).unlink(), f"{NEGATIVE} does not exist, but guidance"),
        (
            lambda data: change(data, "latents", lambda x: x[:, :, :2].contiguous()),
            "(4, 2, 6, 10)",
        ),
        (
            lambda data: change(data, "prompt_embeds", lambda x: x[:, :6].contiguous()),
            "prompt_embeds have shape (6, 16), expected (7, 16)",
        ),
    ],
)
def test_a_folder_of_data(
    start: Callable[..., tuple[int, str]],
    tmp_path: Path,
    data: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    damage(data)
    code, error = start("--data.folder", str(data))
    assert (code, message in error) == (1, True), error
    assert not (tmp_path / "run").exists()


def not_a_number(row: int) -> Callable[[Tensor], Tensor]:
    def changed(latents: Tensor) -> Tensor:
        latents[row, 0, 0, 0, 0] = float("nan")
        return latents

    return changed


def test_a_sample_that_is_not_finite(start: Callable[..., tuple[int, str]], data: Path) -> None:
    change(data, "latents", not_a_number(5))
    code, error = start("--data.folder", str(data))
    assert code == 1
    assert f"{data / '00000.safetensors'}, row 5: latents" in error, error
    assert "last intact checkpoint" in error or "there is no checkpoint yet" in error


# ---- the run folder ----------------------------------------------------------------------------


def test_a_folder_of_another_preset(start: Callable[..., tuple[int, str]], latents: Path) -> None:
    assert start() == (0, "")
    before = Path("run", "metrics.jsonl").read_bytes()
    code, error = start("--method", "scm")
    assert code == 1
    assert "run was created with other settings (method = rcm there, scm now" in error
    assert Path("run", "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_model(
    start: Callable[..., tuple[int, str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert start() == (0, "")
    assert train.main(["cosmos-tiny", "--folder", "other", *NEW]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    code, error = start()
    assert code == 1
    assert "student-0000002 is of another preset or model: averages." in error
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(13, "Permission denied", "w.safetensors"),
            "a file cannot be read: [Errno",
        ),
        (ImportError("run pip install '.[diffusers]'"), "run pip install '.[diffusers]'"),
    ],
)
def test_what_cannot_be_read_or_imported(
    start: Callable[..., tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    def failing(path: Path) -> Any:
        raise error

    monkeypatch.setattr("rcm.run_pretrained.PretrainedFolder.open", failing)
    code, printed = start()
    assert code == 1
    assert printed.startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_synthetic_data_that_were_not_finished_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def write_half(folder: Path, *_: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "00000.safetensors").write_bytes(b"half of it")
        raise KeyboardInterrupt

    options = ["wan-tiny", "--folder", str(tmp_path / "run"), *NEW]
    with monkeypatch.context() as patch:
        patch.setattr("rcm.run_pretrained.write_random_latents", write_half)
        assert train.main(options) == 130
    assert train.main(options) == 0
    assert sorted(path.name for path in (tmp_path / "run").glob("data*")) == ["data"]


# ---- the time ----------------------------------------------------------------------------------


def test_a_network_that_rounds_its_time(
    start: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounded(model: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return WAN.predict(model, x, t.bfloat16(), condition)

    monkeypatch.setitem(ADAPTERS, "wan", replace(WAN, predict=rounded))
    code, error = start()
    assert code == 1
    assert "the student cannot be used: the network rounds its time to torch.bfloat16" in error


# ---- two ranks ---------------------------------------------------------------------------------

HOST = socket.gethostname()


def errors(ranks: ForkedRanks | TorchrunRanks) -> list[str]:
    """The lines about errors that the ranks printed; torchrun adds a traceback of its own."""
    output = ranks.output.read_text().splitlines()
    assert not [line for line in output if line.startswith("[rank")]
    return [line for line in output if line.startswith("error:")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ("--mesh.ulysses 3", "3 ranks, but the run has 2; change --mesh.* or", 2),
        ("--mesh.ring 2 --mesh.ulysses 2", "= 4 ranks, but the run has 2; change --mesh.* or", 2),
        ("--student.batch 3", "--student.batch is 3; it must be a multiple of 2, data-parallel", 2),
        ("--seed x", "--seed is 'x'; it must be an integer", 2),
        ("--model.folder missing", "missing is not a folder; give that of a", 1),
        ("--data.folder missing", "missing is not a folder", 1),
    ],
)
def test_an_error_of_all_ranks_is_printed_once(
    options: str, message: str, code: int, tmp_path: Path
) -> None:
    arguments = ["wan-tiny", "--folder", str(tmp_path / "run"), *options.split()]
    ranks = ForkedRanks(arguments, tmp_path / "output")
    assert ranks.codes() == [code, code]
    [line] = errors(ranks)
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_file_that_only_one_rank_reads(latents: Path, tmp_path: Path) -> None:
    """Each rank reads half of the batch; the sample that is not finite is in one of them."""
    data = Path(shutil.copytree(latents, tmp_path / "data"))
    change(data, "latents", not_a_number(5))
    folder = tmp_path / "run"
    options = ["--folder", str(folder), "--data.folder", str(data), "--student.batch", "2"]
    ranks = TorchrunRanks("rcm.train", ["wan-tiny", *options], tmp_path / "output", "--standalone")
    assert ranks.codes() == [1]
    for line in errors(ranks):  # of the rank that has read it, and of the other
        assert f"{data / '00000.safetensors'}, row 5: latents" in line
        assert f" on {HOST}" in line
    assert iterations(folder) < SAMPLES / 2


@pytest.mark.slow
def test_a_damaged_model_under_torchrun(wan: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(wan, tmp_path / "model"))
    truncate(sorted(model.glob("*.safetensors"))[1])
    options = ["--folder", str(tmp_path / "run"), "--model.folder", str(model)]
    ranks = TorchrunRanks("rcm.train", ["wan-tiny", *options], tmp_path / "output", "--standalone")
    assert ranks.codes() == [1]
    [line] = errors(ranks)
    assert "damaged or truncated" in line
    assert not (tmp_path / "run").exists()
