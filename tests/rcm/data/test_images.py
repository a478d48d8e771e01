"""Images of a user's own: their layouts, what a sample is, and what is kept in memory."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rcm.data.dataset import evenly_spaced, halves
from rcm.data.image_folder import _class_order
from rcm.data.images import ImagesConfig
from rcm.data.pixels import PixelDataset, Pixels
from tests.rcm.data.image_files import (
    CLASSES,
    EACH,
    random_images,
    read_lines,
    save_image,
    write_class_folders,
    write_metadata_folder,
)


def load(path: Path, size: int | None = None) -> PixelDataset:
    return ImagesConfig(folder=str(path), size=size).load()


def whole(data: PixelDataset) -> tuple[torch.Tensor, torch.Tensor]:
    return data.batch(range(len(data)))


def write_csv(path: Path) -> Path:
    folder = write_metadata_folder(path, column="text")
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(read_lines(folder))
    (folder / "metadata.jsonl").unlink()
    return folder


def write_npz(path: Path, labels: str = "labels", first: bool = False) -> Path:
    images = random_images(len(CLASSES) * EACH)
    arrays = {
        "arr_0" if labels == "arr_1" else "images": images.transpose(0, 3, 1, 2)
        if first
        else images,
        labels: np.repeat(CLASSES, EACH) if labels == "labels" else np.repeat([3, 7], EACH),
    }
    np.savez(path.with_suffix(".npz"), **arrays)
    return path.with_suffix(".npz")


@pytest.mark.parametrize(
    "write",
    [
        write_metadata_folder,
        lambda path: write_metadata_folder(path, column="text"),
        write_csv,
        write_npz,
        lambda path: write_npz(path, first=True),
        lambda path: write_npz(path, labels="arr_1"),
    ],
    ids=["jsonl", "jsonl-text", "csv", "npz", "npz-nchw", "npz-arr"],
)
def test_every_layout_gives_the_same_samples(write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    expected = load(write_class_folders(tmp_path / "folders"))
    found = load(write(tmp_path / "other"))
    for tensor, other in zip(whole(found), whole(expected), strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0)
    assert expected.facts.class_names == CLASSES
    assert found.facts.class_names in (CLASSES, ("3", "7"))


def test_samples_are_pixels_in_units_of_their_standard_deviation(tmp_path: Path) -> None:
    data = load(write_class_folders(tmp_path))
    samples, labels = whole(data)
    pixels = torch.from_numpy(random_images(16)).permute(0, 3, 1, 2).double()
    expected = (pixels - pixels.mean()) / pixels.std(correction=0)
    torch.testing.assert_close(samples.double(), expected, rtol=0, atol=1e-6)
    assert labels.tolist() == [0] * EACH + [1] * EACH
    facts = data.facts
    assert facts.sample_shape == (3, 8, 8) and facts.classes == 2 and facts.samples == 16
    restored = 255 * (samples - facts.black) / (facts.white - facts.black)
    torch.testing.assert_close(restored, pixels.float(), rtol=0, atol=1e-3)


def test_moments_are_exact_over_any_number_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.from_numpy(random_images(7)).permute(0, 3, 1, 2)
    pixels = Pixels(images=images, labels=torch.zeros(7).long(), class_names=("all",))
    once = pixels.moments()
    monkeypatch.setattr("rcm.data.pixels.CHUNK", 2 * 3 * 8 * 8)
    assert pixels.moments() == once
    values = images.double()
    assert once == pytest.approx((values.mean().item(), values.std(correction=0).item()))


def test_images_stay_bytes_in_memory(tmp_path: Path) -> None:
    data = load(write_class_folders(tmp_path))
    stored = [value for value in vars(data).values() if isinstance(value, Pixels)]
    assert [pixels.images.dtype for pixels in stored] == [torch.uint8]
    assert not any(
        isinstance(value, torch.Tensor) and value.is_floating_point()
        for value in vars(data).values()
    )


def test_both_halves_have_every_class_of_unsorted_data(tmp_path: Path) -> None:
    labels = np.array([0, 1, 0, 1, 0, 2, 0, 2, 0, 1])  # every 1 and 2 is at an odd position
    np.savez(tmp_path / "data.npz", images=random_images(10), labels=labels)
    data = load(tmp_path / "data.npz")
    for half in halves(len(data)):
        assert data.subset(half).labels.unique().tolist() == [0, 1, 2]
    images = torch.from_numpy(random_images(10)[np.argsort(labels, kind="stable")])
    rank = whole(data)[0].permute(0, 2, 3, 1).flatten().argsort(stable=True)
    assert torch.equal(rank, images.flatten().argsort(stable=True))


def test_an_archive_without_labels_is_one_class(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=random_images(6)[..., 0])
    data = load(tmp_path / "data.npz")
    assert data.facts.sample_shape == (1, 8, 8) and data.facts.classes == 1
    assert data.null_condition(torch.zeros(2).long()).tolist() == [1, 1]


def test_images_without_folders_of_classes_are_one_class(tmp_path: Path) -> None:
    for i, pixels in enumerate(random_images(4, channels=1)):
        save_image(tmp_path / f"{i}.png", pixels)
    (tmp_path / "notes.txt").write_text("ignored")
    assert load(tmp_path).facts.classes == 1


def test_classes_with_numbers_are_ordered_by_number(tmp_path: Path) -> None:
    for name in ("10", "9", "2"):
        for i, pixels in enumerate(random_images(2)):
            save_image(tmp_path / name / "more" / f"{i}.png", pixels)
    assert load(tmp_path).facts.class_names == ("2", "9", "10")


def test_numbers_of_one_value_have_one_order() -> None:
    names = [zeros * "0" + "1" for zeros in range(20)]
    expected = sorted(names, key=len, reverse=True)  # 0 is before 1
    for labels in (names, names[::-1]):
        assert sorted(labels, key=_class_order(labels)) == expected


def test_gray_images_among_coloured_ones_become_coloured(tmp_path: Path) -> None:
    write_class_folders(tmp_path, channels=1)
    assert load(tmp_path).facts.sample_shape == (1, 8, 8)
    save_image(tmp_path / "dog" / "9.png", random_images(1)[0])
    data = load(tmp_path)
    assert data.facts.sample_shape == (3, 8, 8)
    gray, colour = data.subset(torch.tensor([0, 16])).samples
    assert torch.equal(gray[0], gray[2]) and not torch.equal(colour[0], colour[2])


def test_size_crops_the_middle_and_resizes(tmp_path: Path) -> None:
    write_class_folders(tmp_path, side=4)
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255  # the square in the middle
    save_image(tmp_path / "dog" / "wide.png", wide)
    data = load(tmp_path, size=4)
    assert data.facts.sample_shape == (3, 4, 4)
    last = data.subset(torch.tensor([len(data) - 1])).samples
    torch.testing.assert_close(last, torch.full_like(last, data.facts.white))


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    """Cameras store the turn of a photo in its EXIF data."""
    write_class_folders(tmp_path, side=4)
    upright = random_images(2)[1]
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: stored lying on its left side
    stored = Image.fromarray(np.rot90(upright))
    stored.save(tmp_path / "dog" / "photo.png", exif=exif)
    Image.fromarray(upright).save(tmp_path / "dog" / "photo2.png")
    data = load(tmp_path, size=4)
    photo, expected = data.subset(torch.arange(len(data) - 2, len(data))).samples
    torch.testing.assert_close(photo, expected)


def test_files_that_pillow_must_not_guess_are_refused(tmp_path: Path) -> None:
    """An image of a format that is not in the list, under a name that is."""
    write_class_folders(tmp_path)
    Image.fromarray(random_images(1)[0]).save(tmp_path / "cat" / "a.png", format="PCX")
    with pytest.raises(Exception, match=r"a\.png cannot be read as an image"):
        load(tmp_path)


def test_a_text_may_contain_what_unicode_calls_a_line_end(tmp_path: Path) -> None:
    folder = write_metadata_folder(tmp_path, column="text")
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text().replace("cat", "c\u2028t"), encoding="utf-8")
    assert load(folder).facts.class_names == ("c\u2028t", "dog")


def test_evenly_spaced_samples_are_pairs_that_keep_the_halves() -> None:
    assert torch.equal(evenly_spaced(9, 7), torch.arange(7))
    assert torch.equal(evenly_spaced(7, 7), torch.arange(7))
    for count, total in ((4, 7), (10, 51), (2000, 5000), (6, 8)):
        chosen = evenly_spaced(count, total)
        assert len(chosen) == count and len(chosen.unique()) == count
        assert chosen.max() < total and (chosen.diff() > 0).all()
        assert (chosen % 2 == torch.arange(count) % 2).all()
    by_class = torch.arange(10).repeat_interleave(500)
    assert by_class[evenly_spaced(2000, 5000)].bincount().tolist() == [200] * 10
