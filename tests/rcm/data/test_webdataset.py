"""Tars in rCM's WebDataset layout: what is read, and what is wrong with damaged ones."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rcm.data.latents import Latents, LatentsConfig, open_latents
from rcm.data.samples import LATENTS, SampleShapes
from rcm.errors import RunError
from tests.rcm.data.folders import (
    COUNT,
    SHAPES,
    Sample,
    members_of,
    random_samples,
    saved,
    write_tar,
    write_webdataset,
)


def load(folder: Path) -> Latents:
    return LatentsConfig(folder=str(folder), sample_shape=SHAPES.latents, text_length=6).load(
        SHAPES.condition
    )


def members(samples: list[Sample]) -> dict[str, bytes]:
    found = {}
    for number, sample in enumerate(samples):
        found |= members_of(f"{number:02d}", sample)
    return found


# ----------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("suffix", ["pth", "pt"])
@pytest.mark.parametrize("folder", ["", "./", "a.b/"])
def test_names_of_members(suffix: str, folder: str, tmp_path: Path) -> None:
    sample, *_ = random_samples()
    content = members_of(f"{folder}clip.7", sample, suffix)
    write_tar(
        tmp_path / "0.tar", {**content, "readme.md": b"", f"{folder}clip.json": b"{}"}.items()
    )
    data = load(tmp_path)
    assert len(data) == 1
    assert data.sample(0)["text"].equal(sample["text"])


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_folders_and_links(format: int, tmp_path: Path) -> None:
    samples = random_samples()
    content = members(samples)
    key = "k" * 300
    files = tmp_path / "files"
    files.mkdir()
    for name, data in content.items():
        (files / f"{key[:200]}{name}").write_bytes(data)
    (files / "link.latent.pth").symlink_to("elsewhere")
    with tarfile.open(tmp_path / "0.tar", "w", format=format) as tar:
        tar.add(files, "f")
    data = load(tmp_path)
    assert len(data) == COUNT
    read = {data.locate(i)[0].name(i): data.sample(i) for i in range(COUNT)}
    for number, sample in enumerate(samples):
        assert read[f"key f/{key[:200]}{number:02d}"][LATENTS].equal(sample[LATENTS])


@pytest.mark.parametrize("tokens", [0, 1, 4, 6])
@pytest.mark.parametrize("batch_dimension", [False, True])
def test_short_embeddings_are_padded_with_zeros(
    tokens: int, batch_dimension: bool, tmp_path: Path
) -> None:
    sample, *_ = random_samples()
    text = torch.randn(tokens, 7)
    stored = {LATENTS: sample[LATENTS], "text": text}
    if batch_dimension:
        stored = {name: tensor[None] for name, tensor in stored.items()}
    write_tar(tmp_path / "0.tar", members_of("0", stored).items())
    x0, condition = load(tmp_path).batch([0])
    assert x0[0].equal(sample[LATENTS])
    assert condition["text"].shape == (1, 6, 7)
    assert condition["text"][0, :tokens].equal(text)
    assert not condition["text"][0, tokens:].any()


def bytes_read() -> int:
    text = Path("/proc/self/io").read_text()
    return int(text.split("rchar: ")[1].split()[0])


def test_the_index_reads_only_headers_and_a_sample_only_its_members(tmp_path: Path) -> None:
    shapes = SampleShapes((1, 4, 64, 512), {"text": (6, 7)})  # 512 KiB
    write_tar(tmp_path / "0.tar", members(random_samples(20, shapes)).items())
    size = (tmp_path / "0.tar").stat().st_size
    before = bytes_read()
    data, _ = open_latents(tmp_path, shapes)
    assert bytes_read() - before < size / 10
    before = bytes_read()
    data.batch([11, 4])
    assert bytes_read() - before < size / 9


def test_every_tar_is_indexed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = members(random_samples(2)).items()
    for number in range(100):
        write_tar(tmp_path / f"{number:03d}.tar", content)
    opened: list[str] = []
    tarfile_open = tarfile.open

    def counted_open(path: Path, mode: str) -> tarfile.TarFile:
        opened.append(path.name)
        return tarfile_open(path, mode)

    monkeypatch.setattr(tarfile, "open", counted_open)
    data = load(tmp_path)
    data.batch([0, 7, 199, 8])
    assert len(data) == 200
    assert sorted(opened) == [f"{number:03d}.tar" for number in range(100)]


# ----------------------------------------------------------------------------
# Bad members


class Payload:
    """Pickles as code that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["latent", "embed"])
def test_code_in_a_member_is_not_run(kind: str, tmp_path: Path) -> None:
    content = members(random_samples())
    path = tmp_path / "ran"
    content[f"03.{kind}.pth"] = saved(Payload(path))
    write_tar(tmp_path / "0.tar", content.items())
    data = load(tmp_path)
    data.batch([2, 4])
    message = rf"{tmp_path}/0\.tar, key 03: the {kind} cannot be read with weights_only=True"
    with pytest.raises(RunError, match=message):
        data.batch([3])
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the embed cannot be read with weights_only=True"),
        (b"not a tensor", "the embed cannot be read with weights_only=True"),
        (saved(torch.zeros(6, 7))[:-40], "the embed cannot be read with weights_only=True"),
        (saved({"text": torch.zeros(6, 7)}), "the embed is a dict; it must be a dense tensor"),
        (saved(torch.zeros(6, 7).to_sparse()), "the embed is a Tensor; it must be a dense"),
        (saved(torch.zeros(6, 7).double()), "text are float64; they must be"),
        (saved(torch.zeros(6, 8)), r"text have shape \(6, 8\), expected \(6, 7\)"),
        (saved(torch.zeros(7, 7)), r"text have shape \(7, 7\), expected \(6, 7\)"),
        (saved(torch.zeros(2, 6, 7)), r"text have shape \(2, 6, 7\), expected \(6, 7\)"),
        (saved(torch.zeros(7)), r"text have shape \(7,\), expected \(6, 7\)"),
    ],
    ids=range(10),
)
def test_a_bad_embedding_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", (members(random_samples()) | {"03.embed.pth": content}).items())
    data = load(tmp_path)
    with pytest.raises(RunError, match=rf"{tmp_path}/0\.tar, key 03: {message}"):
        data.batch([3])


@pytest.mark.parametrize("kind", ["latent", "embed"])
def test_a_missing_member_is_named(kind: str, tmp_path: Path) -> None:
    content = members(random_samples())
    del content[f"03.{kind}.pth"]
    write_tar(tmp_path / "0.tar", content.items())
    with pytest.raises(RunError, match=rf"0\.tar, key 03: there is no 03\.{kind}\.pth"):
        load(tmp_path)
    data, problems = open_latents(tmp_path, SHAPES)
    assert (len(data), len(problems)) == (COUNT - 1, 1)


@pytest.mark.parametrize("name", ["03.latent.pth", "03.latent.pt"])
def test_a_duplicate_is_named(name: str, tmp_path: Path) -> None:
    content = members(random_samples())
    write_tar(tmp_path / "0.tar", [*content.items(), (name, content["03.latent.pth"])])
    with pytest.raises(RunError, match=r"0\.tar, key 03: there are two latents"):
        load(tmp_path)


def test_a_condition_of_several_tensors_is_refused(tmp_path: Path) -> None:
    write_webdataset(tmp_path, random_samples())
    for condition in ({}, {"text": (6, 7), "pooled": (7,)}):
        _, problems = open_latents(tmp_path, SampleShapes(SHAPES.latents, condition))
        names = ", ".join(condition) or "none"
        assert f"has one text embedding, but the condition is {names}" in problems[0]


# ----------------------------------------------------------------------------
# Bad tars


def cut(part: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(part * len(content))]


def damaged_header(content: bytes) -> bytes:
    place = content.index(b"05.latent.pth")
    return content[:place] + b"x" + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [cut(0), cut(0.001), cut(0.3), cut(0.5), cut(0.8), damaged_header, lambda content: b"x" * 2000],
    ids=["empty", "0.001", "0.3", "0.5", "0.8", "header", "no tar"],
)
def test_a_damaged_tar_is_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    write_tar(path, members(random_samples()).items())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=r"0\.tar: cannot be read as an uncompressed tar"):
        load(tmp_path)


def test_a_tar_that_was_cut_off_at_any_block_is_named(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    write_tar(path, members(random_samples(1)).items())
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + tarfile.BLOCKSIZE
    content = path.read_bytes()
    for size in range(0, end + 1, tarfile.BLOCKSIZE):
        path.write_bytes(content[:size])
        with pytest.raises(RunError, match=r"0\.tar: cannot be read as an uncompressed tar"):
            load(tmp_path)
    path.write_bytes(content[: end + 1024])
    assert len(load(tmp_path)) == 1


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", members(random_samples()).items(), "w:gz")
    with pytest.raises(RunError, match=r"0\.tar: cannot be read as an uncompressed tar"):
        load(tmp_path)


def test_a_tar_of_other_files_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", b"")])
    with pytest.raises(RunError, match=r"0\.tar: there are no samples KEY\.latent\.pth"):
        load(tmp_path)
