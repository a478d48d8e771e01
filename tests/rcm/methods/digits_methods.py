"""Every method of the preset `digits`, with a tiny network and few iterations."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rcm.data.dataset import Dataset
from rcm.data.digits import load_digits
from rcm.presets import PRESETS
from rcm.training.config import FromScratchConfig
from rcm.training.files import save_weights
from rcm.training.method import TEACHER
from rcm.training.trainer import Trainer, Weights, build_networks

METHODS = tuple(PRESETS["digits"].methods)


def digits_config(
    method: str, iterations: int, teacher_run: Path | None = None, **settings: Any
) -> FromScratchConfig:
    """The method's preset with other settings, in which few iterations exercise every loss."""
    config = PRESETS["digits"].config(method)
    student = replace(config.student.shortened(), batch=8, iterations=iterations, **settings)
    model = replace(config.model, dim=16, depth=1, heads=2)  # type: ignore[call-arg]
    return replace(
        config,
        teacher_run=None if teacher_run is None else str(teacher_run),
        model=replace(model, null_class=model.null_class or student.guidance.active),
        student=student,
        report_every=100,
        checkpoint_every=2,
    )


def random_weights() -> Weights:
    """Random weights of a network without optional parts, in place of a trained teacher."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.1 * torch.randn(weight.shape, generator=generator)
        for name, weight in digits_config("scm", 4)
        .build_network(load_digits().facts)
        .state_dict()
        .items()
    }


def save_teacher_run(folder: Path) -> None:
    """Write what other runs need of a run whose teacher is finished."""
    (folder / "config.json").write_text(json.dumps(asdict(digits_config("scm", 4))))
    (folder / "data.json").write_text(json.dumps(asdict(load_digits().facts)))
    save_weights(folder / "teacher.safetensors", random_weights())


def digits_trainer(
    method: str, iterations: int, *, accumulation: int = 1, **settings: Any
) -> Trainer:
    """A trainer of the student, at its first iteration."""
    config = digits_config(method, iterations, **settings)
    digits = load_digits()
    data = Dataset(digits.samples[:64].to(torch.get_default_dtype()), digits.labels[:64], 10)

    def make(start: str) -> nn.Module:
        network = config.build_network(data.facts)
        if start == TEACHER:
            network.load_state_dict(random_weights())
        return network

    networks = build_networks(config.student.roles(), make)
    return Trainer("student", config.student, networks, data, seed=1, accumulation=accumulation)
