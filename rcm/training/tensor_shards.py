"""Sharded tensors in safetensors files: every rank writes one file with its pieces of them.

    whole tensor = pieces of all files, each placed at its offsets

The files have the format of torch.distributed.checkpoint: plain safetensors, in whose metadata
DCP_SHARDING_INFO holds the offsets, as JSON. `safetensors.torch.load_file` reads the pieces, and
`dcp.load` with a HuggingFaceStorageReader the whole tensors.

Compared with dcp.save, this writes from the staged tensors instead of a second and a third copy of
them, computes the SHA-256 on the way, and raises OSError. Compared with dcp.load, elements without
a stored value are an error instead of zeros.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from rcm.errors import RunError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
OFFSETS = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class Piece:
    """Part of a tensor: `values` begins at `offsets`, one for each dimension."""

    offsets: tuple[int, ...]
    values: Tensor


def local_piece(tensor: Tensor) -> Piece:
    """What this rank holds of a tensor; shares its storage. A plain tensor is held completely."""
    if not isinstance(tensor, DTensor):
        return Piece((0,) * tensor.ndim, tensor.detach())
    (chunk,) = tensor.__create_chunk_list__()
    return Piece(tuple(chunk.offsets), tensor.to_local().detach())


def staged_pieces(tensors: Mapping[str, Tensor], *, rank: int, ranks: int) -> dict[str, Piece]:
    """Copies, on the CPU, of the pieces that this rank writes.

    Replicas of a piece are written once; the ranks that hold them share the work. Plain tensors
    are taken to be equal on all ranks.
    """
    staged = {}
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        if _is_writer(tensor, i, rank, ranks):
            piece = local_piece(tensor)
            if piece.values.numel() or not tensor.numel():
                values = torch.empty(piece.values.shape, dtype=tensor.dtype, device="cpu")
                staged[name] = Piece(piece.offsets, values.copy_(piece.values))
    return staged


def _is_writer(tensor: Tensor, i: int, rank: int, ranks: int) -> bool:
    if not isinstance(tensor, DTensor):
        return i % ranks == rank
    coordinate, sizes = tensor.device_mesh.get_coordinate(), tensor.device_mesh.shape
    return coordinate is not None and all(
        isinstance(placement, Shard) or i % sizes[d] == coordinate[d]
        for d, placement in enumerate(tensor.placements)
    )


def write_pieces(path: Path, pieces: Mapping[str, Piece]) -> str:
    """Write pieces on the CPU to a file and the disk; return the file's SHA-256.

    Raises:
        OSError: it cannot be written.
    """
    # Larger elements come first, so that each tensor is aligned.
    names = sorted(pieces, key=lambda name: (-pieces[name].values.itemsize, name))
    offsets = {name: {"saved_offsets": pieces[name].offsets} for name in names}
    header: dict[str, object] = {"__metadata__": {"format": "pt", OFFSETS: json.dumps(offsets)}}
    begin = 0
    for name in names:
        values = pieces[name].values
        end = begin + values.nbytes
        header[name] = {
            "dtype": DTYPES[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for name in names:
            content = pieces[name].values.reshape(-1).view(torch.uint8).numpy().data
            file.write(content)
            digest.update(content)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_pieces(paths: Iterable[Path], tensors: Mapping[str, Tensor]) -> None:
    """Fill what this rank holds of the tensors, in place, with pieces of any sharding.

    Raises:
        RunError: a file is damaged, or the files lack elements of a tensor.
        OSError: a file cannot be read.
    """
    targets = {name: local_piece(tensor) for name, tensor in tensors.items()}
    missing = {name: target.values.numel() for name, target in targets.items()}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                stored = json.loads(file.metadata()[OFFSETS])
                for name in stored.keys() & targets.keys():
                    source = file.get_slice(name)
                    offsets = stored[name]["saved_offsets"]
                    there, here = _overlap(offsets, source.get_shape(), targets[name])
                    part = targets[name].values[here]
                    if part.numel():
                        part.copy_(source[there])
                        missing[name] -= part.numel()
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged ({error})") from error
    if lacking := [name for name, elements in missing.items() if elements]:
        raise RunError(f"the files lack elements of {', '.join(lacking[:3])}")


def _overlap(
    offsets: Iterable[int], shape: Iterable[int], target: Piece
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The elements that a stored piece and a target share, as slices of each of the two."""
    there, here = [], []
    for offset, size, target_offset, target_size in zip(
        offsets, shape, target.offsets, target.values.shape, strict=True
    ):
        begin = max(offset, target_offset)
        end = max(begin, min(offset + size, target_offset + target_size))
        there.append(slice(begin - offset, end - offset))
        here.append(slice(begin - target_offset, end - target_offset))
    return tuple(there), tuple(here)


def described(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, object]]:
    """{name: {"dtype": ..., "shape": [...]}} of whole tensors, such as "bfloat16" and [3, 4]."""
    return {
        name: {"dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape)}
        for name, x in sorted(tensors.items())
    }


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """The size of whole tensors."""
    return sum(math.prod(x.shape) * x.itemsize for x in tensors)
