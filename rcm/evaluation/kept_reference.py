"""Reference samples of a teacher, kept in a folder for the evaluations that would draw them again.

The name of a file is a digest of all that its samples depend on. Other weights, noise or settings
have another file.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from rcm.errors import RunError
from rcm.evaluation.evaluator import BATCH, REFERENCE_STEPS, Evaluator
from rcm.training.config import FromScratchConfig
from rcm.training.files import load_weights, save_weights


def reference_file(
    folder: Path, evaluator: Evaluator, config: FromScratchConfig, weights: Path
) -> Path:
    """The file of the reference samples by a teacher with these settings and weights."""
    facts = {
        "model": asdict(config.model),
        "sigma_max": config.student.sigma_max,
        "noise": [evaluator.noise_seed, *evaluator.noise.shape],
        "labels": evaluator.data.labels.tolist(),
        "steps": REFERENCE_STEPS,
        "rounding": [str(evaluator.noise.device), torch.__version__, config.threads, BATCH],
    }
    digest = sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(weights.read_bytes())
    return folder / f"{digest.hexdigest()[:32]}.safetensors"


def load_reference(path: Path, like: Tensor) -> Tensor:
    """The samples of a file, with the shape (n, ...), dtype and device of like. Raises RunError."""
    samples = load_weights(path).get("samples")
    if samples is None or samples.shape != like.shape:
        raise RunError(f"{path} does not hold the samples of a teacher; delete it")
    return samples.to(like)


def save_reference(path: Path, samples: Tensor) -> None:
    """Write the samples, in a folder that need not exist. Raises RunError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Other processes may write the same file.
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:
            save_weights(Path(aside) / path.name, {"samples": samples.cpu()})
            os.replace(Path(aside) / path.name, path)
    except OSError as error:
        raise RunError(f"writing {path} failed ({error.strerror or error})") from error
