"""Checkpoints that survive a kill at any moment: written aside, renamed, verified when read.

A checkpoint is `<phase>-<iteration>.pt`, one dict of plain values and tensors that torch.load reads
with weights_only=True, and a `.json` with its SHA-256. The `.json` is renamed into place last, so
every checkpoint with a `.json` is complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from rcm.errors import RunError

KEPT = 2  # if the newest turns out to be damaged, the one before it is used


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees either the whole new file or the old one."""
    aside = path.with_name(path.name + ".partial")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write tensors as a safetensors file, atomically."""
    content = safetensors_bytes({name: w.detach().contiguous() for name, w in weights.items()})
    write_atomically(path, content)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist") from error
    except SafetensorError as error:
        raise RunError(
            f"{path} is damaged ({error}); delete it and repeat the command to make it again"
        ) from error


from dataclasses import dataclass


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    phase: str
    iteration: int
    facts: dict


class Checkpoints:
    """The checkpoints in one folder; `phases` are in the order in which they are trained."""

    def __init__(self, folder: Path, phases: tuple[str, ...], layout=None) -> None:
        self.folder = folder
        self.phases = phases
        folder.mkdir(parents=True, exist_ok=True)

    def finish(self): ...

    def save(self, phase, iteration, state, facts) -> Path:
        """Write a checkpoint and delete all but the newest; an OSError keeps the old ones."""
        buffer = io.BytesIO()
        torch.save({"phase": phase, "iteration": iteration, "state": state, "facts": facts}, buffer)
        content = buffer.getvalue()
        path = self.folder / f"{phase}-{iteration:07d}.pt"
        write_atomically(path, content)
        record = {"sha256": hashlib.sha256(content).hexdigest(), "torch": torch.__version__}
        write_atomically(path.with_suffix(".json"), json.dumps(record).encode())
        for old in self.paths()[KEPT:]:
            old.with_suffix(".json").unlink()
            old.unlink()
        return path

    def load(self, path, state):
        loaded = self._load(path)
        for n, x in loaded["state"].items():
            state[n].detach().copy_(x)
        return loaded["facts"]

    def paths(self, before: tuple[str, int] | None = None) -> list[Path]:
        """Complete checkpoints, newest first; all, or those before a phase's iteration."""
        found = []
        for record in self.folder.glob("*.json"):
            phase, _, iteration = record.stem.partition("-")
            if phase in self.phases and iteration.isdigit():
                found.append((self.phases.index(phase), int(iteration), record.with_suffix(".pt")))
        if before is not None:
            end = (self.phases.index(before[0]), before[1])
            found = [entry for entry in found if entry[:2] < end]
        return [path for _, _, path in sorted(found, reverse=True)]

    def latest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest intact checkpoint, or None, and messages about newer damaged ones.

        Raises:
            RunError: there are checkpoints, but all of them are damaged.
        """
        problems: list[str] = []
        for path in self.paths():
            try:
                x = self._load(path)
                return Checkpoint(path, x["phase"], x["iteration"], x["facts"]), problems
            except RunError as error:
                problems.append(str(error))
        if problems:
            raise RunError(
                "; ".join(problems) + ". No intact checkpoint is left; delete the run folder"
            )
        return None, []

    def _load(self, path: Path) -> dict[str, Any]:
        try:
            content = path.read_bytes()
            expected = json.loads(path.with_suffix(".json").read_bytes())["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"checkpoint {path} cannot be read ({error})") from error
        if hashlib.sha256(content).hexdigest() != expected:
            raise RunError(
                f"checkpoint {path} is damaged: its SHA-256 differs from the recorded one"
            )
        state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
        return state
