"""Images and labels of an .npz.

Its arrays are `images` and `labels`, or `arr_0` and `arr_1` as ADM's tools write them.
Images are uint8: (n, side, side, channels), (n, channels, side, side) or (n, side, side). Labels
are integers or texts, (n,); without them all images are of one class.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from rcm.data.pixels import Pixels
from rcm.errors import RunError

NAMES = (("images", "labels"), ("arr_0", "arr_1"))
CHANNELS = (1, 3)
SHOWN = 5  # names of arrays in a message


def read_archive(path: Path) -> Pixels:
    """The images of an .npz. Raises RunError if it cannot be used."""
    images, labels = _arrays(path)
    if images.dtype != np.uint8:
        raise RunError(f"{path}: the images are {images.dtype}; they must be uint8, in 0..255")
    images = _channels_first(path, images)
    if labels is None:
        return Pixels(
            images=torch.from_numpy(images),
            labels=torch.zeros(len(images), dtype=torch.int64),
            class_names=("all",),
        )
    if labels.shape != images.shape[:1]:
        raise RunError(
            f"{path}: the labels have shape {labels.shape}; there must be one for each of the "
            f"{len(images)} images"
        )
    if labels.dtype.kind not in "iuU":
        raise RunError(f"{path}: the labels are {labels.dtype}; they must be integers or texts")
    names, numbers = np.unique(labels, return_inverse=True)
    return Pixels(
        images=torch.from_numpy(images),
        labels=torch.from_numpy(numbers).long(),
        class_names=tuple(map(str, names)),
    )


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The arrays of images and of labels, if there are any."""
    try:
        with np.load(path, allow_pickle=False) as file:
            for images, labels in NAMES:
                if images in file.files:
                    return file[images], file[labels] if labels in file.files else None
            found = ", ".join(file.files[:SHOWN]) or "none"
            if len(file.files) > SHOWN:
                found += ", ..."
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{path} cannot be read ({reason})") from error
    raise RunError(f"{path} has no array `images` or `arr_0`; its arrays are: {found}")


def _channels_first(path: Path, images: np.ndarray) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and images.shape[3] in CHANNELS and images.shape[1] == images.shape[2]:
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in CHANNELS or images.shape[2] != images.shape[3]:
        raise RunError(
            f"{path}: the images have shape {images.shape}; it must be (n, side, side, channels), "
            "(n, channels, side, side) or (n, side, side) with 1 or 3 channels"
        )
    return images
