"""Tensors in safetensors files, read by rows.

A file is the length of its header (8 bytes, little endian), the header (JSON: dtype, shape and byte
range of each tensor) and the data. The rows of a tensor are contiguous, so a rank reads its shard
of a weight as one range of bytes, and no other.

Files are read, not mapped into memory: a file that shrinks meanwhile raises OSError, where a mapped
one would kill the process.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcm.errors import RunError

MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is: in `file`, from byte `offset` on."""

    file: Path
    file_size: int
    """Bytes of the file when its header was read."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def read_rows(self, file: FileIO, start: int, rows: int) -> Tensor:
        """Rows start, ..., start + rows - 1 on the CPU: (rows, *shape[1:]).

        Raises OSError if the file ends too early.
        """
        row_shape = self.shape[1:]
        tensor = torch.empty(rows, *row_shape, dtype=self.dtype)
        data = memoryview(tensor.flatten().view(torch.uint8).numpy().data)
        file.seek(self.offset + start * math.prod(row_shape) * self.dtype.itemsize)
        read = 0
        while read < len(data):
            count = file.readinto(data[read:])
            if not count:
                raise OSError(f"{self.file} ended while it was read; was it replaced meanwhile?")
            read += count
        return tensor

    def read(self, file: FileIO) -> Tensor:
        """The whole tensor. Raises OSError if the file ends too early."""
        if self.shape:
            return self.read_rows(file, 0, self.shape[0])
        return StoredTensor(self.file, self.file_size, self.dtype, (1,), self.offset).read(file)[0]


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a file, by name; reads only its header.

    Raises:
        RunError: the file is no safetensors file, damaged or truncated, or has a tensor of a dtype
            without a PyTorch equivalent.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise RunError(
                f"{path} is damaged or truncated: it has no safetensors header; copy it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        del text
        header.pop("__metadata__", None)
        tensors = {
            name: _stored(path, size, 8 + length, name, entry) for name, entry in header.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path} is damaged: its safetensors header is invalid ({error})") from error
    end = max((t.offset + _bytes(t) for t in tensors.values()), default=8 + length)
    if end != size:
        raise RunError(
            f"{path} is damaged or truncated: it has {size} bytes, but its header describes {end}; "
            "copy it again"
        )
    return tensors


def _stored(path: Path, size: int, data: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise RunError(
            f"{name} in {path} has dtype {entry['dtype']}; supported are {', '.join(DTYPES)}. "
            "Use weights that are not quantized"
        )
    start, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    tensor = StoredTensor(path, size, DTYPES[entry["dtype"]], shape, data + start)
    if start < 0 or min(shape, default=0) < 0 or end - start != _bytes(tensor):
        raise ValueError(f"{name} has {end - start} bytes and shape {shape}")
    return tensor


def _bytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize
