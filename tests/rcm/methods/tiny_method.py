"""Every method of the preset `digits`, with a tiny network and few iterations."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from rcm.data.dataset import Dataset
from rcm.data.digits import load_digits
from rcm.presets import PRESETS
from rcm.train import build_network
from rcm.training.checkpoint import save_weights
from rcm.training.config import RunConfig
from rcm.training.method import TEACHER
from rcm.training.trainer import Trainer, Weights, build_networks

METHODS = tuple(PRESETS["digits"].methods)


def tiny_config(method: str, iterations: int, teacher_run: Path | None = None) -> RunConfig:
    """The method's preset, in which few iterations exercise every loss."""
    config = PRESETS["digits"].config(method)
    return replace(
        config,
        teacher_run=None if teacher_run is None else str(teacher_run),
        model=replace(config.model, dim=16, depth=1, heads=2),  # type: ignore[call-arg]
        student=replace(config.student.shortened(), batch=8, iterations=iterations),
        report_every=100,
        checkpoint_every=2,
    )


def random_weights(config: RunConfig) -> Weights:
    """Random weights of a network without optional parts, in place of a trained teacher."""
    plain = PRESETS["digits"].config("scm").model
    plain = replace(plain, dim=16, depth=1, heads=2)  # type: ignore[call-arg]
    network = build_network(
        replace(config, model=plain, student=PRESETS["digits"].config("scm").student)
    )
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.1 * torch.randn(weight.shape, generator=generator)
        for name, weight in network.state_dict().items()
    }


def save_teacher_run(folder: Path) -> None:
    """Write what other runs need of a run whose teacher is finished."""
    config = tiny_config("scm", 1)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    save_weights(folder / "teacher.safetensors", random_weights(config))


def tiny_trainer(method: str, iterations: int) -> Trainer:
    """A trainer of the student, at its first iteration."""
    config = tiny_config(method, iterations)
    digits = load_digits()
    data = Dataset(digits.samples[:64].to(torch.get_default_dtype()), digits.labels[:64], 10)
    networks = build_networks(
        config.student.roles(),
        lambda: build_network(config),
        {TEACHER: random_weights(config)},
    )
    return Trainer("student", config.student, networks, data, seed=1)
