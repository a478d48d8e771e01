"""Small data sets of random images, as a user may have them on a disk."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog")
EACH = 8


def random_images(count: int, side: int = 8, channels: int = 3) -> np.ndarray:
    """(count, side, side, channels) uint8."""
    shape = (count, side, side, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def save_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze()).save(path)


def write_class_folders(folder: Path, side: int = 8, channels: int = 3) -> Path:
    """Eight images in each of two folders."""
    images = random_images(len(CLASSES) * EACH, side, channels)
    for i, pixels in enumerate(images):
        save_image(folder / CLASSES[i // EACH] / f"{i % EACH}.png", pixels)
    return folder


def write_metadata_folder(folder: Path, side: int = 8, column: str = "label") -> Path:
    """The same images in one folder, with metadata.jsonl."""
    lines = []
    for i, pixels in enumerate(random_images(len(CLASSES) * EACH, side)):
        save_image(folder / f"{i:02}.png", pixels)
        lines.append({"file_name": f"{i:02}.png", column: CLASSES[i // EACH]})
    write_lines(folder, lines)
    return folder


def write_lines(folder: Path, lines: list) -> None:
    """metadata.jsonl"""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text)


def read_lines(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
