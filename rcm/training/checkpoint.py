"""Checkpoints of sharded training: a crash at any moment leaves the finished ones intact.

    checkpoints/PHASE-0000123/
        shard-00000-of-00008.safetensors    one file per rank (rcm/training/tensor_shards.py)
        ...
        manifest.json                       what must be in them (rcm/training/manifest.py)

It is written as .PHASE-0000123.partial and renamed when it is complete and on the disk. A
checkpoint that is deleted is renamed to .PHASE-0000123.deleting first. So every folder without a
dot is a whole checkpoint. Before one is loaded, all its files are compared with the manifest.
Nothing is pickled, and only files of the manifest are read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rcm.errors import RunError
from rcm.training.manifest import Checkpoint, Manifest, digest
from rcm.training.ranks import Ranks
from rcm.training.tensor_shards import (
    DTYPES,
    Piece,
    described,
    read_pieces,
    staged_pieces,
    total_bytes,
    write_pieces,
)

KEPT = 2  # if the newest turns out to be damaged, the one before it is used


class Checkpoints:
    """The checkpoints in one folder, which all ranks share; `phases` are in the order of training.

    All ranks of `group` create it and call its methods together, except `paths` and `intact_paths`.
    Without a group the process is alone. The last call must be `finish`, before the process group
    is destroyed. Every RunError, OSError and TypeError is raised on all ranks alike. RuntimeError
    means that a rank has died.

    Creating it removes what interrupted runs left unfinished, so one run at a time may use it.
    """

    def __init__(
        self,
        folder: Path,
        phases: tuple[str, ...],
        *,
        group: ProcessGroup | None = None,
        keep: int = KEPT,
    ) -> None:
        """keep: the number of checkpoints to keep, at least 1 (ValueError).

        Attribute damaged: those that `latest` found damaged.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}; it must be at least 1")
        self.folder, self.phases, self.keep = folder, phases, keep
        self._ranks = Ranks(group)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        self.damaged: set[Path] = set()
        self._ranks.on_first(self._prepare_folder)

    def _prepare_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for ending in ("partial", "deleting"):
            for leftover in self.folder.glob(f".*.{ending}"):
                shutil.rmtree(leftover)

    # ------------------------------------------------------------------------
    # Saving

    def save(
        self, phase: str, iteration: int, tensors: Mapping[str, Tensor], facts: dict[str, Any]
    ) -> None:
        """Copy a state to the CPU, and write it in the background.

        At most one save is in flight: this finishes the one before. After the new checkpoint is in
        place, it and the newest ones before it are kept, and all others are deleted. Checkpoints
        after it are deleted too: training resumed from an earlier one.

        Args:
            phase, iteration: name the checkpoint; saving twice replaces it.
            tensors: {name: (...)}, in a dtype of `DTYPES`, on any device, of any shape. DTensors
                may be sharded and replicated, over a mesh of all ranks. Plain tensors must be equal
                on all ranks: each is written by one of them.
            facts: JSON; those of rank 0 are written.

        Raises:
            ValueError: the phase is unknown.
            TypeError: a value is no tensor or has an unsupported dtype, or facts are no JSON.
            OSError, RunError: see `finish`.
        """
        if phase not in self.phases:
            raise ValueError(f"phase is {phase!r}; it must be one of {', '.join(self.phases)}")
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} is of type {type(tensor).__name__}; save a tensor instead")
            if tensor.dtype not in DTYPES:
                raise TypeError(
                    f"{name} has dtype {tensor.dtype}; supported are {', '.join(map(str, DTYPES))}"
                )
        manifest = Manifest(
            phase=phase,
            iteration=iteration,
            torch=torch.__version__,
            facts=json.loads(json.dumps(facts)),
            files={},
            tensors=described(tensors),
        )
        self.finish()
        pieces = staged_pieces(tensors, rank=self._ranks.rank, ranks=self._ranks.size)
        size = total_bytes(tensors.values())
        self._saving = self._thread.submit(self._write, manifest, pieces, size)

    def finish(self) -> None:
        """Wait until the save in flight, if any, is in place.

        Raises:
            OSError: a rank could not write; the older checkpoints are kept.
            RunError: the ranks saved different tensors.
        """
        if self._saving is not None:
            wait([self._saving])
            saving, self._saving = self._saving, None
            saving.result()

    def _write(self, manifest: Manifest, pieces: dict[str, Piece], size: int) -> None:
        partial = self.folder / f".{manifest.phase}-{manifest.iteration:07d}.partial"
        shard = partial / f"shard-{self._ranks.rank:05d}-of-{self._ranks.size:05d}.safetensors"
        try:
            self._ranks.on_first(lambda: _make_empty(partial))
            written = self._ranks.on_all(
                lambda: {
                    "name": shard.name,
                    "sha256": write_pieces(shard, pieces),
                    "bytes": shard.stat().st_size,
                    "tensor_bytes": total_bytes(piece.values for piece in pieces.values()),
                    "tensors": digest(manifest.tensors),
                }
            )
            path = self._ranks.on_first(lambda: self._commit(partial, manifest, written, size))
            self.damaged.discard(path)
        except Exception:
            if self._ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _commit(
        self, partial: Path, manifest: Manifest, written: list[dict[str, Any]], size: int
    ) -> Path:
        """Complete a checkpoint, rename it and delete old ones. Returns its path."""
        found = sum(w["tensor_bytes"] for w in written)
        if found != size or any(w["tensors"] != written[0]["tensors"] for w in written):
            raise RunError(
                f"checkpoint {partial} is inconsistent: its tensors have {size} bytes, and {found} "
                "were written. All ranks must save the same tensors, over a mesh of all ranks"
            )
        files = {w["name"]: {"sha256": w["sha256"], "bytes": w["bytes"]} for w in written}
        replace(manifest, files=files).write(partial)
        _sync_folder(partial)
        path = self.folder / f"{manifest.phase}-{manifest.iteration:07d}"
        retired = [_retire(path)] if path.exists() else []
        os.rename(partial, path)
        _sync_folder(self.folder)
        older = self.intact_paths(before=(manifest.phase, manifest.iteration))
        kept = [path, *older[: self.keep - 1]]
        retired += [_retire(other) for other in self.paths() if other not in kept]
        for folder in retired:
            shutil.rmtree(folder)
        return path

    # ------------------------------------------------------------------------
    # Loading

    def paths(self, before: tuple[str, int] | None = None) -> list[Path]:
        """Finished checkpoints, newest first; all, or those before a phase's iteration."""
        found = []
        for path in self.folder.iterdir():
            phase, _, iteration = path.name.rpartition("-")
            if phase in self.phases and iteration.isdigit():
                found.append((self.phases.index(phase), int(iteration), path))
        if before is not None:
            end = (self.phases.index(before[0]), before[1])
            found = [entry for entry in found if entry[:2] < end]
        return [path for _, _, path in sorted(found, reverse=True)]

    def intact_paths(self, before: tuple[str, int] | None = None) -> list[Path]:
        """The `paths` that are not known to be damaged."""
        return [path for path in self.paths(before) if path not in self.damaged]

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest intact checkpoint, or None, and messages about newer damaged ones.

        Raises:
            RunError: there are checkpoints, but all of them are damaged.
            OSError: one cannot be read.
        """
        self.finish()
        problems: list[str] = []
        for path in self._ranks.on_first(self.paths):
            try:
                return self.verified(path), problems
            except RunError as error:
                problems.append(str(error))
                self.damaged.add(path)
        if problems:
            raise RunError(
                "; ".join(problems) + ". No intact checkpoint is left; delete the run folder"
            )
        return None, []

    def verified(self, path: Path) -> Checkpoint:
        """Compare a checkpoint's files with its manifest. Each rank reads a share of them.

        Raises:
            RunError: a file is missing or changed.
            OSError: a file cannot be read.
        """
        self.finish()
        checkpoint = self._ranks.on_first(lambda: Checkpoint.open(path))
        share = checkpoint.files[self._ranks.rank :: self._ranks.size]
        self._ranks.on_all(lambda: checkpoint.require_intact(share))
        return checkpoint

    def load(self, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors in place. They may be sharded in another way, or not at all.

        Raises:
            RunError: names, dtypes or shapes differ from those of the checkpoint; the tensors are
                unchanged. Or a file was changed after it was verified.
        """
        self.finish()
        self._ranks.on_all(lambda: checkpoint.require_same_tensors(described(tensors)))
        try:
            self._ranks.on_all(lambda: read_pieces(checkpoint.files, tensors))
        except (OSError, RunError) as error:
            raise RunError(f"checkpoint {checkpoint.path} cannot be loaded: {error}") from error


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def _retire(path: Path) -> Path:
    """Rename a checkpoint so that nobody takes what is left of it for a whole one."""
    return path.rename(path.with_name(f".{path.name}.deleting"))


def _sync_folder(folder: Path) -> None:
    """Write the names of files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
