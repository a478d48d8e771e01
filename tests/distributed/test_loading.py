"""A network loaded into shards equals the one that diffusers loads; a bad folder is an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rcm.distributed.loading import load_pretrained
from rcm.distributed.pretrained_folder import INDEX, WEIGHTS
from rcm.errors import RunError
from rcm.models.diffusers import Architecture
from tests.distributed.loading_cases import (
    LOADED_ON_TWO,
    build,
    contents,
    four_ranks,
    load,
    meta,
    remade_buffers,
    save,
    two_ranks,
)
from tests.distributed.ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As on the ranks: the order of sums depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By network, in bfloat16 and several files; and two copies that ranks may damage."""
    root = tmp_path_factory.mktemp("folders")
    architectures: tuple[Architecture, ...] = ("wan", "cosmos", "sd3")
    for architecture in architectures:
        save(architecture, root / architecture)
        assert (root / architecture / INDEX).exists()
    for rank in range(2):
        shutil.copytree(root / "wan", root / f"of rank {rank}")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def wan_folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(folders["wan"], tmp_path / "wan"))


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    """The same in one file."""
    save("wan", tmp_path / "one", size="10GB")
    return tmp_path / "one"


@pytest.fixture(scope="module")
def on_two(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    return run_on_ranks(partial(two_ranks, folders=folders), 2, tmp_path_factory.mktemp("ranks"))


def expected(architecture: Architecture, folder: Path) -> dict[str, Tensor]:
    """What diffusers loads; in float32 it may, without accelerate, which is not installed."""
    network_class = type(build(architecture))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_class, "_keep_in_fp32_modules", None)
        return contents(
            architecture, network_class.from_pretrained(folder, torch_dtype=torch.float32)
        )


def check_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# ---- equality ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", LOADED_ON_TWO)
def test_ranks_load_what_diffusers_loads(
    architecture: Architecture, folders: dict[str, Path], on_two: list[dict[str, Any]]
) -> None:
    wanted = expected(architecture, folders[architecture])
    for found in on_two:
        check_equal(found[architecture]["contents"], wanted)


@pytest.mark.parametrize("architecture", LOADED_ON_TWO)
def test_each_rank_reads_only_its_shards(
    architecture: Architecture, on_two: list[dict[str, Any]]
) -> None:
    network = build(architecture).bfloat16()
    whole = sum(p.nbytes for p in network.parameters())
    saved = network.state_dict().keys()
    buffers = sum(b.nbytes for name, b in network.named_buffers() if name in saved)
    shards = [found[architecture]["bytes read"] - buffers for found in on_two]
    assert sum(shards) == whole
    for found, read in zip(on_two, shards, strict=True):
        assert read == 2 * found[architecture]["local parameters"]
        assert read < 0.6 * whole


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("wan", torch.bfloat16), ("cosmos", torch.float16), ("sd3", torch.float32)],
)
def test_one_process_loads_what_diffusers_loads(
    architecture: Architecture, dtype: torch.dtype, tmp_path: Path
) -> None:
    save(architecture, tmp_path / "pipeline" / "transformer", dtype, size="10GB")
    folder = tmp_path / "pipeline"
    check_equal(
        contents(architecture, load(architecture, folder)),
        expected(architecture, folder / "transformer"),
    )


@pytest.mark.slow
def test_copies_of_shards_load_what_diffusers_loads(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    wanted = expected("cosmos", folders["cosmos"])
    for found in run_on_ranks(partial(four_ranks, folders=folders), 4, tmp_path):
        check_equal(found, wanted)


# ---- errors of a folder ------------------------------------------------------------------------


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_header(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))


def first_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def delete_weights(folder: Path, *left: str) -> None:
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    for name in left:
        (folder / name).touch()


# Of a folder with several files. Each changes it, and says what the error contains.
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "there is no folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no network: neither config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "no class": (
        lambda f: (f / "config.json").write_text("{}"),
        'config.json names no class; expected "_class_name"',
    ),
    "other class": (
        lambda f: change_json(f / "config.json", _class_name="SD3Transformer2DModel"),
        "holds a SD3Transformer2DModel; expected a WanTransformer3DModel",
    ),
    "other heads": (
        lambda f: change_json(f / "config.json", num_attention_heads=6),
        "is a network with num_attention_heads 6; this one has 3",
    ),
    "no weights": (delete_weights, "the folder holds no weights"),
    "pickled": (
        lambda f: delete_weights(f, "diffusion_pytorch_model.bin"),
        "only diffusion_pytorch_model.bin. Pickled weights are not loaded",
    ),
    "variant": (
        lambda f: delete_weights(f, "diffusion_pytorch_model.fp16.safetensors"),
        "only diffusion_pytorch_model.fp16.safetensors. Files of a variant",
    ),
    "missing file": (
        lambda f: first_file(f).unlink(),
        "index.json lists are missing: diffusion_pytorch_model-00001-of-",
    ),
    "file elsewhere": (
        lambda f: change_json(f / INDEX, weight_map={"a": "../a.safetensors"}),
        "names '../a.safetensors'; expected a file of the same folder",
    ),
    "empty index": (lambda f: change_json(f / INDEX, weight_map={}), "lists no files"),
    "other index": (
        lambda f: change_tensors(first_file(f), lambda t: t.pop(min(t))),
        "which lists other tensors for it",
    ),
    "truncated": (
        lambda f: first_file(f).write_bytes(first_file(f).read_bytes()[:-7]),
        "is damaged or truncated: it has",
    ),
    "longer": (
        lambda f: first_file(f).write_bytes(first_file(f).read_bytes() + b"\0"),
        "is damaged or truncated: it has",
    ),
    "empty": (lambda f: first_file(f).write_bytes(b""), "it has no safetensors header"),
    "no safetensors": (
        lambda f: first_file(f).write_bytes(b"\x80\x02}q\0" * 100),
        "it has no safetensors header",
    ),
    "damaged header": (
        lambda f: change_header(first_file(f), b'"shape"', b'"shade"'),
        "its safetensors header is invalid",
    ),
    "damaged size": (
        lambda f: change_header(first_file(f), b'"dtype":"BF16"', b'"dtype":"F32" '),
        "its safetensors header is invalid",
    ),
    "quantized": (
        lambda f: change_header(first_file(f), b'"dtype":"BF16"', b'"dtype":"F8_E"'),
        "has dtype F8_E; supported are F64, F32",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_folder_raises_before_anything_is_loaded(damage: str, wan_folder: Path) -> None:
    network = meta("wan", wan_folder)
    change, message = DAMAGES[damage]
    change(wan_folder)
    with pytest.raises(RunError) as raised:
        load_pretrained(network, wan_folder)
    assert message in str(raised.value)
    assert str(wan_folder) in str(raised.value)
    assert all(p.is_meta for p in network.parameters())


def add_and_remove(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("blocks.0.")][:5]:
        del tensors[name]
    tensors["blocks.7.weight"] = torch.zeros(1)
    tensors["proj_out.bias"] = torch.zeros(3)
    tensors["patch_embedding.bias"] = tensors["patch_embedding.bias"].int()
    tensors["blocks.1.norm_added_q.weight"] = torch.zeros(1)  # which diffusers ignores too


def test_tensors_that_do_not_fit_are_named_and_counted(one_file: Path) -> None:
    change_tensors(one_file / WEIGHTS, add_and_remove)
    with pytest.raises(RunError) as raised:
        load_pretrained(meta("wan", one_file), one_file)
    message = str(raised.value)
    assert "does not fit this WanTransformer3DModel: 5 tensors are missing: blocks.0." in message
    assert "and 2 more; 1 tensors are not in the network: blocks.7.weight; 2 tensors" in message
    assert "proj_out.bias (stored (3,), expected (16,))" in message
    assert "patch_embedding.bias (stored torch.int32, expected torch.float32)" in message


def test_all_ranks_raise_the_error_of_one(on_two: list[dict[str, Any]]) -> None:
    messages = on_two[0]["errors"]
    assert on_two[1]["errors"] == messages
    assert messages["missing"].startswith("RunError")
    assert "there is no folder" in messages["missing"]
    assert messages["truncated meanwhile"].startswith("OSError")
    assert "-00001-of-" in messages["truncated meanwhile"]
    assert "changed its size" in messages["truncated meanwhile"]


# ---- errors of a network -----------------------------------------------------------------------


def test_buffers_that_are_not_remade_raise(wan_folder: Path) -> None:
    with pytest.raises(ValueError, match="2 buffers are in no file and must be remade: rope"):
        load_pretrained(meta("wan", wan_folder), wan_folder)
    network = meta("wan", wan_folder)
    remade = remade_buffers("wan", wan_folder)
    with pytest.raises(ValueError, match=r"1 buffers .* must be remade: rope\.freqs_sin"):
        load_pretrained(
            network,
            wan_folder,
            remake_buffers=lambda: {**remade, "rope.freqs_sin": network.rope.freqs_sin},
        )
    for other in (remade["rope.freqs_sin"][:1], remade["rope.freqs_sin"].half()):
        with pytest.raises(ValueError, match=r"the remade buffer rope\.freqs_sin is torch"):
            load_pretrained(
                network,
                wan_folder,
                remake_buffers=lambda other=other: {**remade, "rope.freqs_sin": other},
            )


class WithTable(nn.Module):
    """A tensor that is no buffer, as in QwenImage's rotary embedding."""

    def __init__(self, keep: type = Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.table = torch.arange(3) if keep is Tensor else [torch.arange(3)]


@pytest.fixture
def table_folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"_class_name": "WithTable"}')
    save_file(WithTable().state_dict(), tmp_path / WEIGHTS)
    return tmp_path


def test_tensors_that_are_no_buffers_are_remade_too(table_folder: Path) -> None:
    with torch.device("meta"):
        network, unsupported = WithTable(), WithTable(list)
    with pytest.raises(ValueError, match="1 buffers are in no file and must be remade: table"):
        load_pretrained(network, table_folder)
    with pytest.raises(ValueError, match="table holds tensors in a list"):
        load_pretrained(unsupported, table_folder)
    load_pretrained(network, table_folder, remake_buffers=lambda: vars(WithTable()))
    assert network.table.tolist() == [0, 1, 2]


def test_network_that_cannot_be_loaded_raises(table_folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"linear\.weight, linear\.bias are not on the meta device"
    ):
        load_pretrained(WithTable(), table_folder)
    with torch.device("meta"):
        network = WithTable()
        network.other = network.linear
    with pytest.raises(ValueError, match="WithTable shares weights"):
        load_pretrained(network, table_folder)
