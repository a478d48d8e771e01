"""Shards in rCM's public WebDataset layout: tar files whose members are the samples' tensors.

    KEY.latent.pth   the latents, (channels, frames, height, width)
    KEY.embed.pth    the text embedding, (tokens, dim)
    KEY.prompt.txt   the prompt, which training does not read

`.pt` is the same as `.pth`. The tensors are written by torch.save and read with weights_only=True,
which runs no code of the file. A leading dimension of 1 is dropped. An embedding with fewer tokens
than expected is padded with zeros, as Wan's pipeline does.

Source: the data set of NVlabs/rcm, arXiv 2510.08431.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rcm.data.samples import LATENTS, SampleShapes, Shape
from rcm.errors import RunError

KINDS = ("latent", "embed")
SUFFIXES = {f".{kind}.{suffix}": kind for kind in KINDS for suffix in ("pth", "pt")}


@dataclass(frozen=True, eq=False)
class TarShard:
    """One tar, of which the positions of the members are in memory."""

    path: Path
    shapes: SampleShapes
    keys: tuple[str, ...]
    positions: np.ndarray
    """(samples, 2, 2) int64: offset and size of the latents and of the embedding."""

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, row: int) -> str:
        return f"key {self.keys[row]}"

    def read(self, row: int) -> dict[str, Tensor]:
        """One sample; the file is opened anew, so that no two processes share its position.

        Raises:
            RunError: the file cannot be read, or a member is no tensor saved by torch.save.
        """
        (embedding_name, embedding_shape), *_ = self.shapes.condition.items()
        latents, embedding = (self._tensor(row, kind) for kind in KINDS)
        latents = _without_batch(latents, self.shapes.latents)
        embedding = _padded(_without_batch(embedding, embedding_shape), embedding_shape)
        return {LATENTS: latents, embedding_name: embedding}

    def _tensor(self, row: int, kind: str) -> Tensor:
        offset, size = self.positions[row, KINDS.index(kind)].tolist()
        member = f"{self.path}, key {self.keys[row]}: the {kind}"
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be read ({error})") from error
        try:
            value: Any = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        except Exception as error:  # damaged bytes can raise anything
            reason = " ".join(str(error).split())[:200]
            raise RunError(
                f"{member} cannot be read with weights_only=True ({type(error).__name__}: "
                f"{reason}); it must be a tensor saved by torch.save"
            ) from error
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise RunError(f"{member} is a {type(value).__name__}; it must be a dense tensor")
        return value.detach()

    @classmethod
    def open(cls, path: Path, shapes: SampleShapes) -> tuple[list[TarShard], list[str]]:
        """The shard with its complete samples, and what is wrong with others.

        Reads the headers of the members once, and none of their contents.
        """
        if len(shapes.condition) != 1:
            names = ", ".join(shapes.condition) or "none"
            message = f"a .tar has one text embedding, but the condition is {names}"
            return [], [f"{path}: {message}: write .safetensors shards"]
        try:
            members = _members(path)
        except (tarfile.TarError, OSError) as error:
            return [], [f"{path}: cannot be read as an uncompressed tar ({error})"]
        positions: dict[str, dict[str, tuple[int, int]]] = {}
        problems = []
        for member in members:
            for suffix, kind in SUFFIXES.items():
                if member.isfile() and member.name.endswith(suffix):
                    key = member.name.removesuffix(suffix)
                    found = positions.setdefault(key, {})
                    if kind in found:
                        problems.append(f"{path}, key {key}: there are two {kind}s")
                    found[kind] = (member.offset_data, member.size)
        for key, found in positions.items():
            for kind in KINDS:
                if kind not in found:
                    problems.append(f"{path}, key {key}: there is no {key}.{kind}.pth")
        complete = {key: found for key, found in positions.items() if len(found) == len(KINDS)}
        if not positions:
            problems.append(f"{path}: there are no samples KEY.latent.pth, KEY.embed.pth")
        if not complete:
            return [], problems
        table = np.array([[found[kind] for kind in KINDS] for found in complete.values()])
        return [cls(path, shapes, tuple(complete), table)], problems


def _members(path: Path) -> list[tarfile.TarInfo]:
    """Headers of all members.

    Raises:
        tarfile.TarError: it is no uncompressed tar, or it was cut off.
    """
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        end = tar.offset
    with open(path, "rb") as file:
        file.seek(end)
        # tarfile takes a damaged header for the end. A tar ends with a block of zeros.
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"it is damaged or cut off at byte {end}")
    return members


def _without_batch(tensor: Tensor, shape: Shape) -> Tensor:
    return tensor[0] if tensor.ndim == len(shape) + 1 and len(tensor) == 1 else tensor


def _padded(embedding: Tensor, shape: Shape) -> Tensor:
    """Zeros after the last token; other shapes are returned as they are."""
    if embedding.ndim != 2 or embedding.shape[1:] != shape[1:] or len(embedding) > shape[0]:
        return embedding
    return functional.pad(embedding, (0, 0, 0, shape[0] - len(embedding)))
