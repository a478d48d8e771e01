"""Shards: files with many samples, each tensor with the samples as its first dimension.

A `.safetensors` or `.npz` shard has the tensor "latents", (n, channels[, frames], height, width),
and the tensors of the condition by their names, (n, ...) each. Others are ignored.

A shard knows its number of samples from its header and opens its file anew for every read, so that
it can be used in any number of processes, before and after a fork.
"""

from __future__ import annotations

import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Protocol, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rcm.data.samples import LATENTS, SampleShapes, Shape, tensor_problem
from rcm.errors import RunError

CACHED_NPZ_SHARDS = 2
SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}

UNREADABLE = (  # the last four if a file was replaced
    *(SafetensorError, zipfile.BadZipFile, zlib.error, OSError),
    *(ValueError, KeyError, IndexError, EOFError),
)

Header = dict[str, tuple[str, Shape]]  # dtype and shape, with the samples, of each tensor


class Shard(Protocol):
    """A file with samples."""

    @property
    def path(self) -> Path: ...

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """What identifies a sample within the file."""
        ...

    def read(self, row: int) -> dict[str, Tensor]:
        """One sample, in the dtypes of the file, read without the others where that is possible.

        Raises:
            RunError: the file cannot be read.
        """
        ...


@dataclass(frozen=True)
class _RowShard(ABC):
    path: Path
    rows: int
    tensors: tuple[str, ...]

    def __len__(self) -> int:
        return self.rows

    def name(self, row: int) -> str:
        return f"row {row}"

    def read(self, row: int) -> dict[str, Tensor]:
        try:
            return self._read(row)
        except UNREADABLE as error:
            raise RunError(_unreadable(self.path, error)) from error

    @classmethod
    def open(cls, path: Path, shapes: SampleShapes) -> tuple[list[Self], list[str]]:
        """The shard, or what is wrong with it. Reads only the header."""
        try:
            header = cls._header(path, shapes)
        except UNREADABLE as error:
            return [], [_unreadable(path, error)]
        if problem := _header_problem(header, shapes):
            return [], [f"{path}: {problem}"]
        return [cls(path, header[LATENTS][1][0], tuple(shapes.all()))], []

    @classmethod
    @abstractmethod
    def _header(cls, path: Path, shapes: SampleShapes) -> Header: ...

    @abstractmethod
    def _read(self, row: int) -> dict[str, Tensor]: ...


class SafetensorsShard(_RowShard):
    """A `.safetensors` shard; a read touches only the bytes of one sample."""

    @classmethod
    def _header(cls, path: Path, shapes: SampleShapes) -> Header:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: (SAFETENSORS_DTYPES.get(s.get_dtype(), s.get_dtype()), tuple(s.get_shape()))
                for name, s in slices.items()
            }

    def _read(self, row: int) -> dict[str, Tensor]:
        with safe_open(self.path, "pt") as file:
            return {name: file.get_slice(name)[row] for name in self.tensors}


class NpzShard(_RowShard):
    """An `.npz` shard, whose arrays cannot be read in part.

    The last CACHED_NPZ_SHARDS that a process read stay in its memory. Random access to more shards
    reads a whole shard for almost every sample: use `.safetensors` for large data.
    """

    @classmethod
    def _header(cls, path: Path, shapes: SampleShapes) -> Header:
        header: Header = {}
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                name = member.removesuffix(".npy")
                with archive.open(member) as file:
                    header[name] = _npy_header(file) if name in shapes.all() else ("", ())
        return header

    def _read(self, row: int) -> dict[str, Tensor]:
        arrays = _npz_arrays(self.path, self.path.stat().st_mtime_ns, self.tensors)
        rows = {name: array[row : row + 1].copy() for name, array in arrays.items()}
        return {name: torch.from_numpy(array)[0] for name, array in rows.items()}


@lru_cache(maxsize=CACHED_NPZ_SHARDS)
def _npz_arrays(path: Path, modified: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in names}


def _npy_header(file: IO[bytes]) -> tuple[str, Shape]:
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in read:  # version 3 is only for names of fields, which no float array has
        raise ValueError(f"an array has the .npy version {version}")
    shape, _, dtype = read[version](file)
    return (dtype.name if dtype.isnative else dtype.str), shape


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path}: cannot be read ({type(error).__name__}: {error}); write it again"


def _header_problem(header: Header, shapes: SampleShapes) -> str | None:
    missing = [name for name in shapes.all() if name not in header]
    if missing:
        return f"there is no tensor {missing[0]!r}, only {', '.join(sorted(header)) or 'none'}"
    rows = next(iter(header[LATENTS][1]), 0)  # 0 for a tensor without dimensions
    for name, expected in shapes.all().items():
        dtype, shape = header[name]
        if shape[:1] != (rows,):
            return f"{name} have shape {shape}, but there are {rows} {LATENTS}"
        if problem := tensor_problem(name, dtype, shape[1:], expected):
            return problem
    return None if rows else "there are no samples"
