"""Images of a folder, read with Pillow, and their classes.

Classes are the sub-folders (torchvision's ImageFolder), or the values of a column `label` or `text`
of metadata.jsonl or metadata.csv (Hugging Face's imagefolder). Images directly in the folder,
without either, are of one class. Other files are ignored, and so is what begins with a dot.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from rcm.data.pixels import Pixels
from rcm.errors import RunError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF")
METADATA = ("metadata.jsonl", "metadata.csv")
FILE, COLUMNS = "file_name", ("label", "text")
MAX_TEXTS = 1000
# Modes of Pillow with 8 bits a channel and without transparency.
GRAY, COLOUR = ("L", "1"), ("RGB", "P", "CMYK", "YCbCr")
THREADS = 8


@dataclass(frozen=True)
class _Header:
    """What the first bytes of an image file say."""

    width: int
    height: int
    gray: bool


def read_folder(folder: Path, size: int | None = None) -> Pixels:
    """All images of a folder, in the order of their names.

    size: crop each to the square in its middle and resize that to size×size pixels. Without it all
    images must be square and of one size. Gray images among coloured ones become coloured. Raises
    RunError if a file cannot be used; the message names it.
    """
    files = sorted(_image_files(folder))
    if not files:
        raise RunError(f"{folder} contains no images ({', '.join(SUFFIXES)})")
    metadata = [folder / name for name in METADATA if (folder / name).exists()]
    if len(metadata) > 1:
        raise RunError(f"{folder} has both {' and '.join(METADATA)}; remove one")
    labels = (
        _labels_of_metadata(metadata[0], files) if metadata else _labels_of_folders(folder, files)
    )
    names = sorted(set(labels), key=_class_order(labels))
    number = {name: i for i, name in enumerate(names)}
    return Pixels(
        images=torch.from_numpy(_read_images([folder / file for file in files], size)),
        labels=torch.tensor([number[label] for label in labels]),
        class_names=tuple(names),
    )


def _image_files(folder: Path) -> Iterator[str]:
    """Images below a folder, relative to it, with / between the parts."""

    def stop(error: OSError) -> None:
        raise RunError(f"{error.filename} cannot be read ({error.strerror})") from error

    for path, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield (Path(path) / name).relative_to(folder).as_posix()


def _labels_of_folders(folder: Path, files: Sequence[str]) -> list[str]:
    """The sub-folder of each file."""
    classes = {file.split("/")[0] for file in files if "/" in file}
    beside = [file for file in files if "/" not in file]
    if not classes:
        return ["all"] * len(files)
    if beside:
        raise RunError(
            f"{folder / beside[0]} lies beside the folders of the classes, such as "
            f"{min(classes)}; move it into one"
        )
    folders = {path.name for path in folder.iterdir() if path.is_dir()}
    if empty := {name for name in folders if not name.startswith(".")} - classes:
        raise RunError(f"{folder / min(empty)} is the folder of a class and contains no images")
    return [file.split("/")[0] for file in files]


# ---- metadata ------------------------------------------------------------------------------------


def _labels_of_metadata(path: Path, files: Sequence[str]) -> list[str]:
    """The label or text of each file."""
    labels: dict[str, str] = {}
    column = None
    for line, row in _rows(path):
        where = f"{path}, line {line}"
        if FILE not in row:
            raise RunError(f"{where}: there is no {FILE!r}")
        columns = [name for name in COLUMNS if row.get(name) not in (None, "")]
        if len(columns) != 1 or column not in (None, columns[0]):
            raise RunError(
                f"{where}: there must be one of the columns {' and '.join(COLUMNS)}, the same in "
                "all lines"
            )
        column, file = columns[0], Path(str(row[FILE])).as_posix()
        if file in labels:
            raise RunError(f"{where}: {file} has a label already")
        if not isinstance(row[column], str | int):
            raise RunError(
                f"{where}: the {column} is {row[column]!r}; it must be a text or an integer"
            )
        labels[file] = str(row[column])
    if missing := sorted(labels.keys() - set(files)):
        raise RunError(
            f"{path} has labels of {_count(missing)} that the folder lacks, such as {missing[0]}"
        )
    if unlabelled := [file for file in files if file not in labels]:
        raise RunError(
            f"{path} has no label of {_count(unlabelled)} in the folder, such as {unlabelled[0]}"
        )
    if (texts := len(set(labels.values()))) > MAX_TEXTS and column == "text":
        raise RunError(
            f"{path} has {texts} different texts. The model is conditioned on classes, of which "
            f"each text is one: there can be at most {MAX_TEXTS}"
        )
    return [labels[file] for file in files]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a metadata file with their numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
        if path.suffix == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""))
            yield from [(reader.line_num, row) for row in reader]
            return
    except (OSError, ValueError, csv.Error) as error:
        raise RunError(f"{path} cannot be read ({error})") from error
    for line, content in enumerate(text.split("\n"), 1):  # a text may contain other line ends
        if content.strip():
            try:
                row = json.loads(content)
            except ValueError as error:
                raise RunError(f"{path}, line {line} is no JSON ({error})") from error
            if not isinstance(row, dict):
                raise RunError(f"{path}, line {line} is no JSON object")
            yield line, row


def _class_order(labels: Sequence[str]) -> Any:
    """Numbers by their value, and 01 before 1; other labels by their letters."""
    numbers = all(label.isdecimal() for label in labels)
    return (lambda label: (int(label), label)) if numbers else str


def _count(files: Sequence[str]) -> str:
    return f"{len(files)} image{'s' if len(files) > 1 else ''}"


# ---- pixels --------------------------------------------------------------------------------------


def _read_images(paths: Sequence[Path], size: int | None) -> np.ndarray:
    """The pixels of all files: (n, channels, side, side) uint8."""
    with ThreadPoolExecutor(THREADS) as pool:  # Pillow decodes without holding the interpreter
        headers = list(pool.map(_header, paths))
        if size is None:
            _require_equal_squares(paths, headers)
            size = headers[0].width
        mode = "L" if all(header.gray for header in headers) else "RGB"
        images = np.empty((len(paths), 1 if mode == "L" else 3, size, size), np.uint8)

        def read(index: int) -> None:
            images[index] = _decoded(paths[index], mode, images.shape[-1])

        for _ in tqdm(pool.map(read, range(len(paths))), total=len(paths), disable=None):
            pass
    return images


def _require_equal_squares(paths: Sequence[Path], headers: Sequence[_Header]) -> None:
    first = headers[0]
    remedy = "--data.size N crops each to a square and resizes it to N×N pixels"
    for path, header in zip(paths, headers, strict=True):
        if (header.width, header.height) != (first.width, first.height):
            raise RunError(
                f"the images must be of one size: {paths[0]} has {first.width}×{first.height} "
                f"pixels, {path} {header.width}×{header.height}. {remedy}"
            )
    if first.width != first.height:
        raise RunError(
            f"the images must be square: {paths[0]} has {first.width}×{first.height} pixels. "
            f"{remedy}"
        )


def _header(path: Path) -> _Header:
    with _opened(path) as image:
        if image.mode not in GRAY + COLOUR or "transparency" in image.info:
            raise RunError(
                f"{path} has the mode {image.mode} of Pillow, or transparency; images must be gray "
                "or coloured, with 8 bits a channel and opaque"
            )
        return _Header(image.width, image.height, gray=image.mode in GRAY)


def _decoded(path: Path, mode: str, size: int) -> np.ndarray:
    """(channels, size, size)."""
    from PIL.Image import Resampling

    with _opened(path) as stored:
        image = stored.convert(mode)
        if image.size != (size, size):
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side))
            image = square.resize((size, size), Resampling.BICUBIC)
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """An image file, turned upright as its EXIF data say. Its pixels are not read yet unless it was
    turned. Raises RunError for whatever fails inside."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=FORMATS) as image:
            ImageOps.exif_transpose(image, in_place=True)
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RunError(f"{path} cannot be read as an image ({error})") from error
