"""Shards of safetensors and npz: what is read, and what is wrong with damaged ones."""

from __future__ import annotations

import json
import os
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rcm.data import shards
from rcm.data.latents import Latents, LatentsConfig, open_latents
from rcm.data.samples import LATENTS, SampleShapes
from rcm.errors import RunError
from tests.rcm.data.folders import (
    COUNT,
    SAMPLES_PER_SHARD,
    SHAPES,
    WRITERS,
    random_samples,
    stacked,
    write_npz,
    write_safetensors,
)


def load(folder: Path) -> Latents:
    return LatentsConfig(folder=str(folder), sample_shape=SHAPES.latents, text_length=6).load(
        SHAPES.condition
    )


def write_shard(folder: Path, layout: str, tensors: dict[str, Tensor]) -> None:
    if layout == "npz":
        np.savez(folder / "00.npz", **{name: t.numpy() for name, t in tensors.items()})
    else:
        save_file(tensors, folder / "00.safetensors")


@pytest.fixture(params=["safetensors", "npz"])
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


# ----------------------------------------------------------------------------
# Reading


def peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_read_of_safetensors_touches_one_sample(tmp_path: Path) -> None:
    shape, rows = (4, 8, 128, 128), 2048  # 4 GiB, of which the file system stores nothing
    size = rows * 4 * 8 * 128 * 128 * 4
    header = {LATENTS: {"dtype": "F32", "shape": [rows, *shape], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with open(tmp_path / "00.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    data, problems = open_latents(tmp_path, SampleShapes(shape, {}))
    assert not problems
    assert len(data) == rows
    before = peak_resident_bytes()
    x0, condition = data.batch([2000, 3])
    assert x0.shape == (2, *shape)
    assert not x0.any()
    assert not condition
    assert peak_resident_bytes() - before < 100 * 2**20


def test_two_npz_shards_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path, random_samples(5 * SAMPLES_PER_SHARD))
    data = load(tmp_path)
    loaded: list[str] = []
    np_load = np.load

    def counted_load(path: Path, **options: bool) -> object:
        loaded.append(path.stem)
        return np_load(path, **options)

    monkeypatch.setattr(np, "load", counted_load)
    data.batch(range(len(data)))
    assert loaded == ["00", "01", "02", "03", "04"]
    data.batch([12, 9, 14, 11])  # the last two shards
    assert len(loaded) == 5
    data.batch([0])
    assert loaded[5:] == ["00"]
    assert shards._npz_arrays.cache_info().currsize == 2


def test_an_npz_shard_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    write_npz(tmp_path, random_samples())
    data = load(tmp_path)
    before, _ = data.batch([0])
    samples = random_samples()
    samples[0][LATENTS] += 1
    write_npz(tmp_path, samples)
    os.utime(tmp_path / "00.npz", ns=(1, 1))
    assert data.batch([0])[0].equal(before + 1)


def test_a_condition_without_dimensions(layout: str, tmp_path: Path) -> None:
    shapes = SampleShapes(SHAPES.latents, {"fps": ()})
    write_shard(tmp_path, layout, stacked(random_samples(COUNT, shapes)))
    data, problems = open_latents(tmp_path, shapes)
    assert not problems
    assert data.batch([5, 1])[1]["fps"].shape == (2,)


def test_other_tensors_are_ignored(layout: str, tmp_path: Path) -> None:
    tensors = stacked(random_samples()) | {"seeds": torch.arange(3)}
    write_shard(tmp_path, layout, tensors)
    assert load(tmp_path).batch([2])[0].equal(tensors[LATENTS][2:3])


def test_other_files_in_an_npz_are_ignored(tmp_path: Path) -> None:
    write_npz(tmp_path, random_samples())
    with zipfile.ZipFile(tmp_path / "00.npz", "a") as archive:
        archive.writestr("notes.txt", "of the VAE")
    assert len(load(tmp_path)) == COUNT


# ----------------------------------------------------------------------------
# Bad shards


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({LATENTS: None}, "there is no tensor 'latents', only text"),
        ({"text": None}, "there is no tensor 'text', only latents"),
        ({LATENTS: torch.zeros(8, 2, 3, 4, 5).double()}, "latents are float64|latents are F64"),
        ({"text": torch.zeros(8, 6, 7).int()}, "text are int32|text are I32"),
        ({"text": torch.zeros(8, 6, 9)}, r"text have shape \(6, 9\), expected \(6, 7\)"),
        ({"text": torch.zeros(7, 6, 7)}, r"text have shape \(7, 6, 7\), but there are 8 latents"),
        ({LATENTS: torch.zeros(2, 3, 4, 5)}, r"shape \(3, 4, 5\), expected \(2, 3, 4, 5\)"),
        ({LATENTS: torch.tensor(0.0)}, r"latents have shape \(\), but"),
        (
            {LATENTS: torch.zeros(0, 2, 3, 4, 5), "text": torch.zeros(0, 6, 7)},
            "there are no samples",
        ),
    ],
    ids=str,
)
def test_a_bad_header_is_named(
    layout: str, change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    tensors = {**stacked(random_samples()), **change}
    write_shard(tmp_path, layout, {n: t for n, t in tensors.items() if t is not None})
    with pytest.raises(RunError, match=rf"1 problem;.* {tmp_path}/00\.{layout}: .*({message})"):
        load(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_shard_that_was_cut_off_is_named(layout: str, kept: float, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path, random_samples())
    path = tmp_path / f"01.{layout}"
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(RunError, match=rf"01\.{layout}: cannot be read .*; write it again"):
        load(tmp_path)


@pytest.mark.parametrize("place", [62, 400], ids=["start", "middle"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_arrays_of_an_npz_are_named(
    save: Callable[..., None], place: int, tmp_path: Path
) -> None:
    path = tmp_path / "00.npz"
    save(path, **{name: t.numpy() for name, t in stacked(random_samples()).items()})
    content = bytearray(path.read_bytes())
    for damaged in range(place, place + 100):
        content[damaged] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"00\.npz: cannot be read"):
        load(tmp_path).batch([4])


def test_an_npz_member_that_is_no_array_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "00.npz", "w") as archive:
        archive.writestr("latents.npy", "of the VAE")
    with pytest.raises(RunError, match=r"00\.npz: cannot be read \(ValueError"):
        load(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {LATENTS: torch.zeros(1, 2, 3, 4, 5), "text": torch.zeros(1, 6, 7)},
        {LATENTS: torch.zeros(8, 2, 3, 4, 5)},
        {},
    ],
    ids=["fewer rows", "fewer tensors", "empty"],
)
def test_a_shard_that_was_replaced_is_named(
    layout: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    write_shard(tmp_path, layout, stacked(random_samples()))
    data = load(tmp_path)
    path = tmp_path / f"00.{layout}"
    if tensors:
        write_shard(tmp_path, layout, tensors)
    else:
        path.write_bytes(b"")
    os.utime(path, ns=(1, 1))
    with pytest.raises(RunError, match=rf"00\.{layout}: cannot be read"):
        data.batch([4])


class Payload:
    """Pickles as code that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_objects_in_an_npz_are_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "ran"
    objects = np.array([Payload(path)] * 8, dtype=object)
    np.savez(tmp_path / "00.npz", latents=objects, text=np.zeros((8, 6, 7), np.float32))
    with pytest.raises(RunError, match=r"00\.npz: latents are object"):
        load(tmp_path)
    assert not path.exists()


def test_arrays_of_another_byte_order_are_refused(tmp_path: Path) -> None:
    tensors = {name: t.numpy().astype(">f4") for name, t in stacked(random_samples()).items()}
    np.savez(tmp_path / "00.npz", **tensors)
    with pytest.raises(RunError, match=r"latents are >f4; they must be"):
        load(tmp_path)


def test_only_bad_shards_are_left_out(tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_samples())
    (tmp_path / "01.safetensors").write_bytes(b"")
    data, problems = open_latents(tmp_path, SHAPES)
    assert len(problems) == 1
    assert len(data) == COUNT - SAMPLES_PER_SHARD
    assert data.sample(4)[LATENTS].equal(random_samples()[7][LATENTS])
