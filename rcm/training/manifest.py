"""The manifest of a checkpoint: what is in it, to find damage before anything is loaded.

manifest.json holds phase, iteration, version of torch, facts, and

    files      {name: {"sha256", "bytes"}}
    tensors    {name: {"dtype", "shape"}}, unsharded
    sha256     of all of this
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rcm.errors import RunError

MANIFEST = "manifest.json"
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json."""

    phase: str
    iteration: int
    torch: str
    facts: dict[str, Any]
    files: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]

    def write(self, folder: Path) -> None:
        """Write it to the disk. Raises OSError."""
        content = asdict(self)
        with open(folder / MANIFEST, "w") as file:
            json.dump({**content, "sha256": digest(content)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk.

    Every method raises RunError if it is damaged or does not fit, and OSError if it cannot be read,
    which says nothing about it: a file system may be out of reach for a while.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the manifest, but no other file."""
        try:
            content = json.loads((path / MANIFEST).read_bytes())
            recorded = content.pop("sha256")
            intact = recorded == digest(content)
            manifest = Manifest(**content)
        except (*NO_FILE, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({error})"
            ) from error
        if not intact:
            raise RunError(f"checkpoint {path} is damaged: {MANIFEST} was changed")
        return cls(path, manifest)

    @property
    def phase(self) -> str:
        return self.manifest.phase

    @property
    def iteration(self) -> int:
        return self.manifest.iteration

    @property
    def facts(self) -> dict[str, Any]:
        """What was given to `Checkpoints.save`."""
        return self.manifest.facts

    @property
    def files(self) -> list[Path]:
        """All files but the manifest."""
        return [self.path / name for name in sorted(self.manifest.files)]

    def require_intact(self, files: Iterable[Path]) -> None:
        """Compare some of the files with the manifest."""
        for path in files:
            record = self.manifest.files[path.name]
            damaged = f"checkpoint {self.path} is damaged: {path.name}"
            try:
                with path.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    if size != record["bytes"]:
                        raise RunError(f"{damaged} has {size} bytes instead of {record['bytes']}")
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except NO_FILE as error:
                raise RunError(f"{damaged} cannot be read ({error})") from error
            if found != record["sha256"]:
                raise RunError(f"{damaged} was changed: its SHA-256 differs from the recorded one")

    def require_same_tensors(self, asked: dict[str, dict[str, Any]]) -> None:
        """Compare names, dtypes and shapes."""
        stored = self.manifest.tensors
        differences = [
            f"{name} is {_text(stored.get(name))} there, {_text(asked.get(name))} here"
            for name in sorted(stored.keys() | asked.keys())
            if stored.get(name) != asked.get(name)
        ]
        if differences:
            more = f"; {len(differences) - 3} more" if len(differences) > 3 else ""
            raise RunError(
                f"checkpoint {self.path} is of another preset or model: "
                f"{'; '.join(differences[:3])}{more}"
            )


def digest(content: dict[str, Any]) -> str:
    """SHA-256 of JSON, in any order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _text(tensor: dict[str, Any] | None) -> str:
    return "absent" if tensor is None else f"{tensor['dtype']} {tuple(tensor['shape'])}"
