"""A user's own images: a folder of image files (image_folder.py) or an .npz (image_archive.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import tyro

from rcm.data.classifier import ImageClassifier, train_classifier
from rcm.data.dataset import LabelledData, LabelledDataConfig
from rcm.data.image_archive import read_archive
from rcm.data.image_folder import read_folder
from rcm.data.pixels import PixelDataset, Pixels
from rcm.errors import OptionError, RunError
from rcm.validation import require_integer

MAX_SIZE = 4096
MIN_IMAGES = 4  # two in each half


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(LabelledDataConfig):
    """Images of one's own, in classes."""

    name: ClassVar[str] = "images"

    folder: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Folder of images, in a folder for each class or with metadata.jsonl or .csv; or an .npz."""
    size: int | None = None
    """Crop each image file to the square in its middle and resize it to size × size pixels."""

    def __post_init__(self) -> None:
        if self.folder is not None and not isinstance(self.folder, str):
            raise TypeError(f"folder is {self.folder!r}; it must be a path")
        if self.size is not None:
            require_integer(1, MAX_SIZE, size=self.size)

    def load(self) -> PixelDataset:
        """Read the images.

        Raises:
            OptionError: folder is not set or does not exist, or size is set beside an .npz.
            RunError: the images cannot be used.
        """
        if self.folder is None:
            raise OptionError("--data.folder is missing; it must be a folder of images or an .npz")
        path = Path(self.folder)
        if not path.exists():
            raise OptionError(f"--data.folder is {path}, which does not exist")
        if self.size is not None and not path.is_dir():
            raise OptionError(f"--data.size is {self.size}, but {path} is no folder; leave it out")
        try:
            pixels = read_folder(path, self.size) if path.is_dir() else read_archive(path)
        except MemoryError as error:
            raise RunError(f"the images of {path} do not fit into memory ({error})") from error
        _require_usable(pixels, path)
        return PixelDataset(pixels)

    def classifier(self, data: LabelledData) -> ImageClassifier:
        return train_classifier(data)


def _require_usable(pixels: Pixels, path: Path) -> None:
    if len(pixels.labels) < MIN_IMAGES:
        raise RunError(
            f"{path} has {len(pixels.labels)} images; at least {MIN_IMAGES} are needed, two in "
            "each half of the data"
        )
    counts = torch.bincount(pixels.labels, minlength=len(pixels.class_names))
    single = int(counts.argmin())
    if counts[single] < 2:
        raise RunError(
            f"{path} has one image of the class {pixels.class_names[single]}; a class needs two, "
            "because a classifier trains on one half of the images and is tested on the other"
        )
    if pixels.images.amin() == pixels.images.amax():
        raise RunError(f"{path}: all pixels of all images are equal")
