"""Latents and text embeddings in a folder of shards, read by index.

A folder holds shards of one layout, in the order of their names (docs/data.md shows each):

    *.safetensors   shards.py; the one to choose
    *.npz           shards.py
    *.tar           webdataset.py, rCM's public data

Beside them, negative.safetensors holds the condition of guidance: the embedding of the negative
prompt, one tensor for each name of the condition that guidance replaces.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rcm.data.samples import LATENTS, SampleShapes, Shape, tensors_problem
from rcm.data.shards import NpzShard, SafetensorsShard, Shard
from rcm.data.webdataset import TarShard
from rcm.errors import RunError
from rcm.named_shapes import NamedShape, latent_sizes, resolve
from rcm.validation import require_choice, require_integer

Layout = type[SafetensorsShard] | type[NpzShard] | type[TarShard]
LAYOUTS: dict[str, Layout] = {".safetensors": SafetensorsShard, ".npz": NpzShard, ".tar": TarShard}
NEGATIVE = "negative.safetensors"
OPENING_THREADS = 16  # network file systems take milliseconds for each file

NullCondition = Literal["negative", "zeros"]


@dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """A folder of latents in units of σd (normalised as the model sees them) and embeddings."""

    folder: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder with shards: *.safetensors, *.npz, or *.tar in rCM's WebDataset layout."""
    sample_shape: tuple[int, ...]
    """Shape of the latents of a sample: channels, frames, height, width; images have no frames."""
    text_length: int
    """Tokens of a text's embedding. Shorter ones of the WebDataset layout are padded with zeros."""
    image_length: int = 257
    """Tokens of an image's embedding, which image-to-video takes; Wan2.1's CLIP gives 257."""
    null_condition: NullCondition = "negative"
    """Condition of guidance: the folder's negative.safetensors, or zeros."""

    def __post_init__(self) -> None:
        require_integer(1, text_length=self.text_length, image_length=self.image_length)
        require_choice(get_args(NullCondition), null_condition=self.null_condition)
        if self.folder is not None and not isinstance(self.folder, str):
            raise TypeError(f"folder is {self.folder!r}; it must be a path")
        if len(self.sample_shape) not in (3, 4):
            raise ValueError(
                f"sample_shape is {self.sample_shape}; it must be (channels, frames, height, "
                "width), or (channels, height, width) for images"
            )
        for i, size in enumerate(self.sample_shape):
            require_integer(1, **{f"sample_shape[{i}]": size})

    def load(self, condition: Mapping[str, NamedShape], fixed: Collection[str] = ()) -> Latents:
        """Open the folder.

        Args:
            condition: what the network needs, by name: the shapes for one sample.
            fixed: names of conditions that guidance keeps, such as an image to start from.

        Raises:
            RunError: a shard cannot be used; the message names the first one.
            ValueError: as `condition_sizes`.
        """
        if self.folder is None:
            raise RunError("the data have no folder; give it with --data.folder")
        shapes = SampleShapes(self.sample_shape, self.condition_sizes(condition), frozenset(fixed))
        data, problems = open_latents(Path(self.folder), shapes, self.null_condition)
        if problems:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            raise RunError(
                f"{self.folder} has {count}; the first: {problems[0]}. `python -m rcm.data.check` "
                "lists all"
            )
        return data

    def condition_sizes(self, condition: Mapping[str, NamedShape]) -> dict[str, Shape]:
        """The shapes of a condition with these settings' sizes in place of names.

        Raises:
            ValueError: there is no size of that name, such as frames for images.
        """
        sizes = {"text": self.text_length, "image": self.image_length}
        sizes |= latent_sizes(self.sample_shape)
        return {name: resolve(name, shape, sizes) for name, shape in condition.items()}


class Latents:
    """Random access to the samples of shards. It has no state: index i is always the same sample.

    Any number of processes may read it, before and after a fork or through pickle.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        shapes: SampleShapes,
        null: Mapping[str, Tensor] | str,
    ) -> None:
        """null is the null condition of one sample by name, or why there is none."""
        self.shards, self.shapes = tuple(shards), shapes
        self._null = null
        self._ends = list(accumulate(len(shard) for shard in self.shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[Shard, int]:
        """The shard of a sample and its row in it. Raises IndexError outside of 0..len - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        shard = self.shards[number]
        return shard, index - self._ends[number] + len(shard)

    def sample(self, index: int) -> dict[str, Tensor]:
        """One sample as the file has it: "latents" and the condition, by name.

        Raises:
            RunError: it cannot be read, or a tensor has another shape or dtype or is not finite.
                The message names the file and the row or key.
        """
        shard, row = self.locate(index)
        sample = shard.read(row)
        if problem := tensors_problem(sample, self.shapes.all()):
            raise RunError(f"{shard.path}, {shard.name(row)}: {problem}")
        return sample

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """x0 (n, ...) and the condition's tensors (n, ...), float32 on the CPU, in that order.

        Raises:
            RunError: as `sample`, on the rank that reads the sample.
        """
        samples = [self.sample(index) for index in indices]
        stacked = {
            name: torch.stack([sample[name].float() for sample in samples])
            for name in self.shapes.all()
        }
        return stacked.pop(LATENTS), stacked

    def null_condition(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The condition of guidance, like the condition (n, ...) in shape, dtype and device.

        Raises:
            RunError: the folder has none.
        """
        if isinstance(self._null, str):
            raise RunError(self._null)
        return {
            name: c if name in self.shapes.fixed else self._null[name].to(c).expand_as(c)
            for name, c in condition.items()
        }


def open_latents(
    folder: Path, shapes: SampleShapes, null: NullCondition = "negative"
) -> tuple[Latents, list[str]]:
    """The usable samples of a folder, and what makes others unusable, as far as headers tell.

    Raises:
        RunError: the folder has no shards, or shards of several layouts.
    """
    paths = _shard_paths(folder)
    layout = LAYOUTS[paths[0].suffix]
    with ThreadPoolExecutor(OPENING_THREADS) as pool:
        opened = list(pool.map(lambda path: layout.open(path, shapes), paths))
    shards: list[Shard] = [shard for found, _ in opened for shard in found]
    problems = [problem for _, found in opened for problem in found]
    try:
        condition: Mapping[str, Tensor] | str = _read_null(folder / NEGATIVE, shapes, null)
    except RunError as error:
        condition = str(error)
        problems.append(condition)
    return Latents(shards, shapes, condition), problems


def _shard_paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder")
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != NEGATIVE)
    paths = [path for path in files if path.suffix in LAYOUTS]
    suffixes = sorted({path.suffix for path in paths})
    if not suffixes:
        raise RunError(f"{folder} has no shards: no *{', no *'.join(LAYOUTS)}")
    if len(suffixes) > 1:
        raise RunError(
            f"{folder} has shards of several layouts, {' and '.join(suffixes)}: the same samples "
            "could be in both; move one away"
        )
    return paths


def _read_null(path: Path, shapes: SampleShapes, null: NullCondition) -> Mapping[str, Tensor] | str:
    """The null condition of one sample by name, or why there is none.

    Raises:
        RunError: negative.safetensors exists, but cannot be used.
    """
    if null == "zeros":
        return {name: torch.zeros(shape) for name, shape in shapes.guided().items()}
    if not path.exists():
        needed = ", ".join(f"{name} {shape}" for name, shape in shapes.guided().items())
        return (
            f"{path} does not exist, but guidance needs it: the embedding of the negative or empty "
            f"prompt ({needed}), written by safetensors.torch.save_file. Or set "
            "data.null-condition to zeros"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: cannot be read ({error})") from error
    condition = {}
    for name, shape in shapes.guided().items():
        if name not in tensors:
            names = ", ".join(sorted(tensors)) or "none"
            raise RunError(f"{path}: there is no tensor {name!r}, only {names}")
        tensor = tensors[name]
        condition[name] = tensor[0] if tuple(tensor.shape) == (1, *shape) else tensor
    if problem := tensors_problem(condition, shapes.guided()):
        raise RunError(f"{path}: {problem}")
    return condition
