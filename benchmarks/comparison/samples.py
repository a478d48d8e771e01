"""The samples of the grid: a few of each class for every method, from the same noise.

They are kept in one small file, as 8-bit gray levels within the range of the real data.
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from comparison.run import Run
from safetensors.torch import load, load_file, save
from torch import Tensor

from rcm.training.files import write_atomically

STUDIES = ("methods", "teacher")
PER_CLASS = 3  # of the eight of each class that rcm.evaluate writes
SEED = 0

_lock = threading.Lock()


def keep_samples(run: Run, evaluation: Path, kept: Path) -> None:
    """Add the samples of a run of the grid to the file; those of other runs are left out."""
    if run.name.partition("/")[0] not in STUDIES or run.seed != SEED:
        return
    found = load_file(evaluation)
    data, labels = found["data"], found["labels"]
    low, high = (bound.item() for bound in data.aminmax())
    chosen = [(labels == c).nonzero()[:PER_CLASS, 0] for c in labels.unique()]
    with _lock:
        tensors = samples(kept)
        for name, images in found.items():
            if name != "labels":
                levels = _levels(images[torch.cat(chosen)], low, high)
                tensors[f"{run.name}/{name}"] = levels
        write_atomically(kept, save(tensors))


def samples(kept: Path) -> dict[str, Tensor]:
    """The samples by RUN/PANEL: (classes · PER_CLASS, channels, height, width) uint8."""
    return load(kept.read_bytes()) if kept.exists() else {}


def _levels(images: Tensor, low: float, high: float) -> Tensor:
    return ((images - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8).contiguous()
