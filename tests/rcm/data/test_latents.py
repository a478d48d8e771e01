"""Every layout: random access gives what was written, in every process; bad samples are named."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rcm.data.latents import Latents, LatentsConfig
from rcm.data.samples import LATENTS
from rcm.errors import RunError
from tests.rcm.data.folders import (
    COUNT,
    SHAPES,
    WRITERS,
    random_samples,
    write_npz,
    write_safetensors,
)

ORDERS = ([0], [7, 0, 3, 5, 3], list(range(COUNT)))


def load(folder: Path, null_condition: str = "negative") -> Latents:
    config = LatentsConfig(
        folder=str(folder),
        sample_shape=SHAPES.latents,
        text_length=6,
        null_condition=null_condition,  # type: ignore[arg-type]
    )
    return config.load(SHAPES.condition)


@pytest.fixture(params=WRITERS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


# ----------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_batch_is_the_samples_that_were_written(
    layout: str, order: list[int], tmp_path: Path
) -> None:
    samples = random_samples()
    WRITERS[layout](tmp_path, samples)
    data = load(tmp_path)
    assert len(data) == COUNT
    x0, condition = data.batch(order)
    assert x0.equal(torch.stack([samples[i][LATENTS] for i in order]))
    assert list(condition) == ["text"]
    assert condition["text"].equal(torch.stack([samples[i]["text"] for i in order]))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("safetensors", torch.float16),
        ("safetensors", torch.bfloat16),
        ("npz", torch.float16),  # NumPy has no bfloat16
        ("tar", torch.float16),
        ("tar", torch.bfloat16),
    ],
    ids=str,
)
def test_every_dtype_becomes_float32_without_a_change(
    layout: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    samples = [{n: t.to(dtype) for n, t in sample.items()} for sample in random_samples()]
    WRITERS[layout](tmp_path, samples)
    x0, condition = load(tmp_path).batch([4, 1])
    assert x0.dtype == condition["text"].dtype == torch.float32
    assert x0.equal(torch.stack([samples[i][LATENTS] for i in (4, 1)]).float())
    assert condition["text"].equal(torch.stack([samples[i]["text"] for i in (4, 1)]).float())


def test_a_sample_outside_of_the_data_raises(layout: str, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path, random_samples())
    for index in (-1, COUNT):
        with pytest.raises(IndexError, match=f"sample {index} of {COUNT}"):
            load(tmp_path).batch([index])


def test_a_pickled_data_set_is_the_same(layout: str, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path, random_samples())
    data = load(tmp_path)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.batch([6, 2])[0].equal(data.batch([6, 2])[0])


def test_no_file_stays_open(layout: str, tmp_path: Path) -> None:
    # A fork would share its position with the other processes.
    WRITERS[layout](tmp_path, random_samples())
    data = load(tmp_path)
    kept = data.batch([0, 4])
    opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert not [path for path in opened if path.startswith(str(tmp_path))]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert len(kept[0]) == 2


def test_forked_processes_read_at_once(layout: str, tmp_path: Path) -> None:
    """In a process of its own: one that has threads, as those of pytest-xdist, must not fork."""
    command = [sys.executable, "-m", "tests.rcm.data.test_latents", layout, str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)


def read_in_forks(layout: str, folder: Path) -> None:
    samples = random_samples()
    WRITERS[layout](folder, samples)
    data = load(folder)
    data.batch([0])  # what this opened or cached is inherited
    context = multiprocessing.get_context("fork")
    ends, processes = [], []
    for seed in range(3):
        ours, theirs = context.Pipe()
        process = context.Process(target=read_often, args=(data, seed, theirs))
        process.start()
        ends.append(ours)
        processes.append(process)
    own = wrong_reads(data, 3)
    assert own == 0
    assert [end.recv() for end in ends] == [0, 0, 0]
    for process in processes:
        process.join()


def read_often(data: Latents, seed: int, result: Connection) -> None:
    torch.set_num_threads(1)
    result.send(wrong_reads(data, seed))


def wrong_reads(data: Latents, seed: int) -> int:
    samples = random_samples()
    order = torch.randint(COUNT, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
    return sum(not data.sample(i)[LATENTS].equal(samples[i][LATENTS]) for i in order)


# ----------------------------------------------------------------------------
# Shapes of the condition


def test_sizes_of_the_condition_are_those_of_the_settings() -> None:
    condition = {
        "prompt_embeds": ("text", 4096),
        "image_latents": (20, "frames", "height", "width"),
        "image_embeds": ("image", 1280),
        "pooled_prompt_embeds": (2048,),
    }
    wan = LatentsConfig(sample_shape=(16, 21, 60, 104), text_length=512)
    assert wan.condition_sizes(condition) == {
        "prompt_embeds": (512, 4096),
        "image_latents": (20, 21, 60, 104),
        "image_embeds": (257, 1280),
        "pooled_prompt_embeds": (2048,),
    }
    image = LatentsConfig(sample_shape=(16, 60, 104), text_length=9, image_length=2)
    sizes = image.condition_sizes({"a": ("text", "image"), "b": ("height", "width")})
    assert sizes == {"a": (9, 2), "b": (60, 104)}


def test_a_size_that_the_samples_do_not_have_is_named() -> None:
    images = LatentsConfig(sample_shape=(16, 60, 104), text_length=9)
    message = (
        "image_latents has the shape (20, 'frames', 'height'): 'frames' is neither a number nor "
        "one of text, image, height, width; latents of images have no frames"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        images.condition_sizes({"image_latents": (20, "frames", "height")})


# ----------------------------------------------------------------------------
# Null condition


@pytest.mark.parametrize("batch_dimension", [False, True])
def test_the_null_condition_is_the_negative_one(batch_dimension: bool, tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_samples())
    negative = torch.randn(6, 7).bfloat16()
    stored = negative[None] if batch_dimension else negative
    save_file({"text": stored}, tmp_path / "negative.safetensors")
    data = load(tmp_path)
    assert len(data) == COUNT
    _, condition = data.batch([0, 1, 2])
    null = data.null_condition(condition)
    assert list(null) == ["text"]
    assert null["text"].dtype == torch.float32
    assert null["text"].equal(negative.float().expand(3, 6, 7))


def test_the_null_condition_can_be_zeros(layout: str, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path, random_samples())
    data = load(tmp_path, "zeros")
    assert data.null_condition({"text": torch.ones(3, 6, 7)})["text"].equal(torch.zeros(3, 6, 7))


def test_a_missing_negative_condition_says_how_to_make_it(layout: str, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path, random_samples())
    data = load(tmp_path)
    message = r"negative\.safetensors does not exist.*text \(6, 7\).*save_file.*zeros"
    with pytest.raises(RunError, match=message):
        data.null_condition({"text": torch.ones(3, 6, 7)})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"txt": torch.zeros(6, 7)}, "there is no tensor 'text', only txt"),
        ({"text": torch.zeros(5, 7)}, r"shape \(5, 7\), expected \(6, 7\)"),
        ({"text": torch.zeros(2, 6, 7)}, r"shape \(2, 6, 7\), expected \(6, 7\)"),
        ({"text": torch.zeros(6, 7).int()}, "text are int32"),
        ({"text": torch.full((6, 7), torch.nan)}, "text have 42 values that are NaN"),
    ],
)
def test_a_bad_negative_condition_is_named(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    write_safetensors(tmp_path, random_samples())
    save_file(tensors, tmp_path / "negative.safetensors")
    with pytest.raises(RunError, match=rf"negative\.safetensors: .*{message}"):
        load(tmp_path)


def test_a_damaged_negative_condition_is_named(tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_samples())
    (tmp_path / "negative.safetensors").write_bytes(b"{}")
    with pytest.raises(RunError, match=r"negative\.safetensors: cannot be read"):
        load(tmp_path)


# ----------------------------------------------------------------------------
# Bad samples and folders


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [LATENTS, "text"])
def test_a_value_that_is_not_finite_names_the_sample(
    layout: str, name: str, value: float, tmp_path: Path
) -> None:
    samples = random_samples()
    samples[4][name].view(-1)[3] = value
    WRITERS[layout](tmp_path, samples)
    data = load(tmp_path)
    data.batch([3, 5])
    place = {"tar": "01.tar, key 0101"}.get(layout, f"01.{layout}, row 1")
    message = f"{tmp_path}/{place}: {name} have 1 values that are NaN or infinite"
    with pytest.raises(RunError, match=re.escape(message)):
        data.batch([3, 4])


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((4, 3, 4, 5), "Wan 2.1's latents have 16 channels, those of Wan 2.2's 5B model 48"),
        ((2, 4, 4, 5), "77 video frames are 20 latent frames, 81 are 21"),
    ],
)
def test_another_shape_names_the_sample_and_both_shapes(
    layout: str, shape: tuple[int, ...], hint: str, tmp_path: Path
) -> None:
    samples = random_samples()
    for sample in samples[3:6]:
        sample[LATENTS] = torch.zeros(shape)
    WRITERS[layout](tmp_path, samples)
    place = {"tar": "01.tar, key 0101"}.get(layout, f"01.{layout}")
    message = f"{tmp_path}/{place}: latents have shape {shape}, expected (2, 3, 4, 5) ({hint})"
    with pytest.raises(RunError, match=re.escape(message)):
        load(tmp_path).batch([4])


def test_a_file_that_disappears_is_named(layout: str, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path, random_samples())
    data = load(tmp_path)
    (tmp_path / f"01.{layout}").unlink()
    with pytest.raises(RunError, match=rf"01\.{layout}: cannot be read"):
        data.batch([4])


def test_every_empty_folder_is_named(tmp_path: Path) -> None:
    save_file({"text": torch.zeros(6, 7)}, tmp_path / "negative.safetensors")
    with pytest.raises(RunError, match=r"has no shards: no \*\.safetensors, no \*\.npz, no \*\.t"):
        load(tmp_path)
    with pytest.raises(RunError, match="nothing is not a folder"):
        load(tmp_path / "nothing")


def test_two_layouts_in_a_folder_are_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_samples())
    write_npz(tmp_path, random_samples())
    with pytest.raises(RunError, match=r"several layouts, \.npz and \.safetensors"):
        load(tmp_path)


def test_a_condition_cannot_be_named_latents(tmp_path: Path) -> None:
    config = LatentsConfig(folder=str(tmp_path), sample_shape=SHAPES.latents, text_length=6)
    with pytest.raises(ValueError, match="'latents'"):
        config.load({LATENTS: (6, 7)})


if __name__ == "__main__":
    read_in_forks(sys.argv[1], Path(sys.argv[2]))
