"""`python -m rcm.train` on images of a user's own."""

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from rcm import run, run_from_scratch, sample, train
from rcm.data import images
from rcm.data.classifier import ImageClassifier, train_classifier
from rcm.data.dataset import Dataset, LabelledData
from rcm.evaluation.evaluator import Evaluator, sample_student
from tests.rcm.commands.tiny_run import one_line_of
from tests.rcm.data.image_files import (
    random_images,
    read_lines,
    save_image,
    write_class_folders,
    write_lines,
    write_metadata_folder,
)

pytestmark = pytest.mark.xdist_group("train")

TINY = [
    *("--model.dim", "16", "--model.depth", "1", "--model.heads", "2"),
    *("--teacher.batch", "8", "--student.batch", "8", "--device", "cpu", "--threads", "1"),
]
SHORT = [*TINY, "--method", "scm", "--teacher.iterations", "2", "--student.iterations", "2"]


@pytest.fixture(autouse=True)
def _short_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "train_classifier", partial(train_classifier, steps=2))


@pytest.fixture
def _train_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """If images are accepted, the command ends with status 0 instead of training."""
    monkeypatch.setattr(run, "run_from_scratch", lambda *arguments: None)


def save_archive(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("preset", "method", "size"),
    [("images", "rcm", 8), ("cifar10", "scm", 32), ("imagenet64", "sct", 64)],
)
def test_a_dry_run_on_a_few_images(
    preset: str, method: str, size: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = write_class_folders(tmp_path / "images", side=8 if preset == "images" else 16)
    if preset == "imagenet64":
        labels = np.arange(16) % 3
        folder = save_archive(tmp_path / "a.npz", arr_0=random_images(16, 64), arr_1=labels)
    options = ["--data.size", "32"] if preset == "cifar10" else []
    command = [preset, "--method", method, "--data.folder", str(folder), *options, *TINY]
    assert train.main([*command, "--folder", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "dry run: everything was built" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_run_on_images_is_sampled_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = write_class_folders(tmp_path / "images")
    made, out = str(tmp_path / "run"), tmp_path / "grid.png"
    start = ["images", "--data.folder", str(folder), "--folder", made, *SHORT]
    assert train.main(start) == 0
    facts = json.loads((tmp_path / "run" / "data.json").read_text())
    assert facts["class_names"] == ["cat", "dog"] and facts["sample_shape"] == [3, 8, 8]
    folder.rename(tmp_path / "elsewhere")
    drawn = []

    def draw(student: nn.Module, noise: Tensor, labels: Tensor, *rest: Any) -> Tensor:
        drawn.append(labels.tolist())
        return sample_student(student, noise, labels, *rest)

    monkeypatch.setattr(sample, "sample_student", draw)
    for options in ([], ["--classes", "1", "--num", "3"]):
        assert sample.main([made, "--out", str(out), *options]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")
    assert drawn == [[0] * 10 + [1] * 10, [1] * 3]
    capsys.readouterr()
    assert sample.main([made, "--classes", "2", "--out", str(out)]) == 2
    assert "--classes is (2,); they must be integers in 0..1" in one_line_of(capsys)
    monkeypatch.setattr(sample, "MAX_CLASSES", 1)
    assert sample.main([made, "--out", str(out)]) == 2
    assert "the run has 2 classes, and a picture shows up to 1: choose" in one_line_of(capsys)

    # The same run cannot continue with other images, even if they are as many.
    write_class_folders(folder)
    (folder / "cat").rename(folder / "cow")
    assert train.main([*start, "--student.iterations", "2"]) == 1
    assert "not those that the run started with: their class_names changed" in one_line_of(capsys)


def test_scores_use_some_samples_and_the_classifier_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = {}

    class Recorded(Evaluator):
        def __init__(self, data: Dataset, *rest: Any) -> None:
            used["evaluator"] = data.labels.tolist()
            super().__init__(data, *rest)

    def train_recorded(data: LabelledData) -> ImageClassifier:
        used["classifier"] = len(data)
        return train_classifier(data, steps=2)

    monkeypatch.setattr(images, "train_classifier", train_recorded)
    monkeypatch.setattr(run_from_scratch, "Evaluator", Recorded)
    folder = write_class_folders(tmp_path / "images")
    command = ["images", *SHORT, "--data.folder", str(folder), "--evaluation-samples", "8"]
    assert train.main([*command, "--folder", str(tmp_path / "run")]) == 0
    assert used == {"evaluator": [0] * 4 + [1] * 4, "classifier": 16}


@pytest.mark.parametrize(
    ("each", "options"),
    [
        (2, ("--teacher.batch", "4", "--student.batch", "4")),
        (8, ("--evaluation-samples", "4")),
        (8, ("--evaluation-samples", "6")),
    ],
)
def test_too_few_samples_to_score_are_noticed_before_the_training(
    each: int,
    options: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def trained(*arguments: object, **options: object) -> None:
        raise AssertionError("a network was trained")

    monkeypatch.setattr(run_from_scratch, "train", trained)
    folder = write_class_folders(tmp_path / "images")
    for path in folder.glob("*/*.png"):
        if int(path.stem) >= each:
            path.unlink()
    command = ["images", *SHORT, "--data.folder", str(folder), "--folder", str(tmp_path / "run")]
    assert train.main([*command, *options]) == 1
    line = one_line_of(capsys)
    assert "real samples cannot be scored: each half of them must have at least 4" in line
    assert "takes more images per class or a larger --evaluation-samples; there is no" in line


def unequal(folder: Path) -> Path:
    write_class_folders(folder)
    save_image(folder / "dog" / "9.png", random_images(1, 12)[0])
    return folder


def oblong(folder: Path) -> Path:
    for i in range(4):
        save_image(folder / f"{i}.png", random_images(1)[0, :6])
    return folder


def corrupt(folder: Path) -> Path:
    write_class_folders(folder)
    whole = (folder / "dog" / "3.png").read_bytes()
    (folder / "dog" / "3.png").write_bytes(whole[: len(whole) // 2])
    return folder


def not_an_image(folder: Path) -> Path:
    write_class_folders(folder)
    (folder / "dog" / "3.png").write_text("not an image")
    return folder


def transparent(folder: Path) -> Path:
    write_class_folders(folder, channels=4)
    return folder


def without_file(folder: Path) -> Path:
    write_metadata_folder(folder)
    (folder / "03.png").unlink()
    return folder


def metadata(change: Callable[[list], list], folder: Path) -> Path:
    write_metadata_folder(folder, column="text")
    write_lines(folder, change(read_lines(folder)))
    return folder


def broken_line(folder: Path) -> Path:
    write_metadata_folder(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "label": 1}\n{"file_name"\n')
    return folder


def not_csv(folder: Path) -> Path:
    write_metadata_folder(folder)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,label\n" + "a" * 200_000)
    return folder


def two_metadata(folder: Path) -> Path:
    write_metadata_folder(folder)
    (folder / "metadata.csv").write_text("file_name,label\n")
    return folder


def beside(folder: Path) -> Path:
    write_class_folders(folder)
    save_image(folder / "a.png", random_images(1)[0])
    return folder


def empty_class(folder: Path) -> Path:
    write_class_folders(folder)
    (folder / "cow").mkdir()
    return folder


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def single(folder: Path) -> Path:
    write_class_folders(folder)
    save_image(folder / "cow" / "0.png", random_images(1)[0])
    return folder


def three_images(folder: Path) -> Path:
    for i, pixels in enumerate(random_images(3)):
        save_image(folder / f"{i}.png", pixels)
    return folder


def archive(folder: Path, **arrays: np.ndarray) -> Path:
    return save_archive(folder.with_suffix(".npz"), **arrays)


def pickled(folder: Path) -> Path:
    path = folder.with_suffix(".npz")
    path.write_bytes(pickle.dumps({"images": [1, 2]}))
    return path


def damaged_archive(folder: Path) -> Path:
    path = archive(folder, images=random_images(16))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    return path


OBJECTS = np.array([{"a": 1}] * 16, dtype=object)
BAD = {
    unequal: (
        "the images must be of one size: {folder}/cat/0.png has 8×8 pixels, "
        "{folder}/dog/9.png 12×12. --data.size N crops"
    ),
    oblong: "the images must be square: {folder}/0.png has 8×6 pixels",
    corrupt: "{folder}/dog/3.png cannot be read as an image (",
    not_an_image: "{folder}/dog/3.png cannot be read as an image (",
    transparent: "{folder}/cat/0.png has the mode RGBA of Pillow, or transparency",
    without_file: (
        "{folder}/metadata.jsonl has labels of 1 image that the folder lacks, such as 03.png"
    ),
    partial(metadata, lambda lines: lines[2:]): (
        "{folder}/metadata.jsonl has no label of 2 images in the folder, such as 00.png"
    ),
    partial(metadata, lambda lines: [*lines, lines[0]]): "line 17: 00.png has a label already",
    partial(metadata, lambda lines: [{"text": "a"}]): "line 1: there is no 'file_name'",
    partial(metadata, lambda lines: [{**lines[0], "label": 1}]): (
        "line 1: there must be one of the columns label and text"
    ),
    partial(metadata, lambda lines: [{**lines[0], "text": ["a"]}]): "line 1: the text is ['a']; it",
    broken_line: "{folder}/metadata.jsonl, line 2 is no JSON",
    not_csv: "{folder}/metadata.csv cannot be read (field larger than field limit",
    two_metadata: "{folder} has both metadata.jsonl and metadata.csv; remove one",
    beside: "{folder}/a.png lies beside the folders of the classes, such as cat",
    empty_class: "{folder}/cow is the folder of a class and contains no images",
    empty: "{folder} contains no images (.png, ",
    single: "{folder} has one image of the class cow; a class needs two",
    three_images: "{folder} has 3 images; at least 4 are needed",
    partial(archive, pictures=random_images(16)): (
        "{folder}.npz has no array `images` or `arr_0`; its arrays are: pictures"
    ),
    partial(archive, images=random_images(16).astype(np.float32)): (
        "{folder}.npz: the images are float32; they must be uint8"
    ),
    partial(archive, images=random_images(16)[:, :6]): (
        "{folder}.npz: the images have shape (16, 6, 8, 3); it must be (n, side, side, channels)"
    ),
    partial(archive, images=random_images(16), labels=np.zeros(15, int)): (
        "{folder}.npz: the labels have shape (15,); there must be one for each of the 16 images"
    ),
    partial(archive, images=random_images(16), labels=np.zeros(16)): (
        "{folder}.npz: the labels are float64; they must be integers or texts"
    ),
    partial(archive, images=random_images(16), labels=OBJECTS): (
        "{folder}.npz cannot be read (Object arrays cannot be loaded"
    ),
    partial(archive, images=np.zeros((16, 8, 8, 3), np.uint8)): (
        "{folder}.npz: all pixels of all images are equal"
    ),
    pickled: "{folder}.npz cannot be read (",
    damaged_archive: "{folder}.npz cannot be read (",
}


@pytest.mark.usefixtures("_train_nothing")
@pytest.mark.parametrize(("make", "message"), BAD.items(), ids=range(len(BAD)))
def test_images_that_cannot_be_used_are_named_and_nothing_is_written(
    make: Callable[[Path], Path], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "images"
    path = make(folder)
    command = ["images", *TINY, "--data.folder", str(path), "--folder", str(tmp_path / "run")]
    assert train.main(command) == 1
    assert message.format(folder=folder) in one_line_of(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_train_nothing")
def test_more_texts_than_classes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("rcm.data.image_folder.MAX_TEXTS", 1)
    folder = write_metadata_folder(tmp_path / "images", column="text")
    assert (
        train.main(["images", "--data.folder", str(folder), "--folder", str(tmp_path / "run")]) == 1
    )
    assert "has 2 different texts. The model is conditioned on classes" in one_line_of(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_train_nothing")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--data.folder is missing; it must be a folder of images or an .npz"),
        (["--data.folder", "nowhere"], "--data.folder is nowhere, which does not exist"),
        (["--data.size", "0"], "--data.size is 0; it must be an integer in 1.."),
        (["--data.size", "8.5"], "--data.size is '8.5'; it must be an integer"),
        (
            ["--data.folder", "a.npz", "--data.size", "8"],
            "--data.size is 8, but a.npz is no folder",
        ),
        (
            ["--data.folder", "a.npz", "--model.patch", "3"],
            "--model.patch is 3; it must divide 8, ",
        ),
        (
            ["--data.folder", "a.npz", "--teacher.batch", "17"],
            "--teacher.batch is 17; it must be at most 16, the number of samples of images",
        ),
        (["--data.folder", "a.npz", "--evaluation-samples", "3"], "--evaluation-samples is 3; it"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_options_of_images_that_are_not_allowed(
    options: list[str],
    message: str,
    dry_run: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_archive(tmp_path / "a.npz", images=random_images(16))
    assert train.main(["images", *TINY, *options, *(["--dry-run"] if dry_run else [])]) == 2
    assert message in one_line_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_settings_and_help_do_not_read_the_images(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def read(*arguments: object) -> None:
        raise AssertionError("the images were read")

    monkeypatch.setattr(images.ImagesConfig, "load", read)
    assert train.parse(["images", "--data.folder", "/nowhere"]).config is not None
    with pytest.raises(SystemExit, match="0"):
        train.main(["images", "--help"])
    assert "--data.folder" in capsys.readouterr().out
