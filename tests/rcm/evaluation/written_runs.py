"""Run folders as `rcm.train` and `rcm.evaluate` write them, with known numbers and no training."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CLASSES, COUNT = 10, 8
PROTOCOL = {"noise_seed": 1, "samples": 1797, "features": "classifier", "reference_steps": 32}


def write_run(folder: Path, **options: Any) -> Path:
    """A finished run with an evaluation; options: those of the functions below."""
    evaluation = {name: options.pop(name) for name in ("fd", "channels") if name in options}
    write_unfinished(folder, **options)
    write_evaluation(folder, **evaluation)
    return folder


def write_unfinished(
    folder: Path,
    *,
    preset: str = "digits",
    method: str = "scm",
    seed: int = 0,
    lr: float = 1e-4,
    iterations: int = 40,
    teacher: str | None = None,
) -> Path:
    folder.mkdir()
    settings = {
        "preset": preset,
        "method": method,
        "seed": seed,
        "teacher_run": teacher,
        "threads": 1,
        "student": {"iterations": iterations, "batch": 64, "optimizer": {"lr": lr}},
        "mesh": {"ring": 1},
        "accumulation": 1,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "metrics.jsonl").write_text("".join(_lines(iterations, seed)))
    return folder


def _lines(iterations: int, seed: int) -> list[str]:
    lines: list[dict[str, Any]] = [{"phase": "teacher", "iteration": 1, "loss": 77.0}]
    for i in range(iterations + 1):
        if i:
            noise = math.sin(7 * i + seed)
            losses = {"loss": 1 + 0.1 * noise, "grad_norm": 2 + noise}
            norms = {"tangent_norm": 0.5 + i / iterations, "jvp_norm": 0.3}
            lines.append({"phase": "student", "iteration": i, **losses, **norms})
        if i % 10 == 0:
            probe = {"probe_rmse": 0.4 - 0.2 * i / iterations, "probe_agreement": 0.9}
            limit = {} if i else {"probe_rmse_limit": 0.6}
            lines.append({"phase": "student", "iteration": i, **probe, **limit})
        if i and i % (iterations // 2) == 0:
            for steps in (1, 2):
                name = f"student, {steps} step{'s' if steps > 1 else ''}"
                scores = scores_of(30.0 - 20 * i / iterations, 0.5)
                lines.append({"phase": "student", "iteration": i, "samples": name, **scores})
    return [json.dumps(line) + "\n" for line in lines]


def scores_of(fd: float, rmse: float | None) -> dict[str, Any]:
    return {
        "frechet_distance": fd,
        "label_agreement": 0.96,
        "same_noise_rmse": rmse,
        "diversity": 0.5,
    }


def write_evaluation(folder: Path, *, fd: float = 2.0, channels: int = 1) -> None:
    """One whose student has the distance fd with one step, half with two, a quarter with four."""
    rest = {"mid_times": None, "diversity_ratio": None, "precision": 0.9, "recall": 0.8}
    rows: list[dict[str, Any]] = [
        {"network": "real", "steps": None, "evaluations": None, **scores_of(1.5, None), **rest}
    ]
    for steps in (1, 8, 32):
        facts = {"network": "teacher", "steps": steps, "evaluations": 2 * steps - 1}
        rows.append({**facts, **scores_of(32 / steps, 0.5 / steps), **rest})
    for steps in (1, 2, 4):
        facts = {"network": "student", "steps": steps, "evaluations": steps}
        ratios = {"diversity_ratio": 1.25 - steps / 8, "precision": 0.7, "recall": steps / 8}
        rows.append({**facts, **scores_of(fd / steps, 0.25), **rest, **ratios})
    settings = json.loads((folder / "config.json").read_text())
    content = {
        **{name: settings[name] for name in ("preset", "method", "seed", "teacher_run")},
        **{name: settings["student"][name] for name in ("iterations", "batch")},
        "torch": "2.13.0",
        "protocol": PROTOCOL,
        "rows": rows,
    }
    (folder / "evaluation.json").write_text(json.dumps(content))
    save_file(samples(channels), folder / "evaluation.safetensors")


def samples(channels: int = 1) -> dict[str, Tensor]:
    """Data from -1 to 1: brighter from sample to sample; the others differ from it by a little."""
    shape = (CLASSES * COUNT, channels, 8, 8)
    data = torch.linspace(-1, 1, CLASSES * COUNT).view(-1, 1, 1, 1).expand(shape).clone()
    names = {"teacher-32": 0.01, "student-1": 0.5, "student-2": 0.3, "student-4": 0.2}
    labels = torch.arange(CLASSES).repeat_interleave(COUNT)
    return {"data": data, "labels": labels, **{n: data + shift for n, shift in names.items()}}
