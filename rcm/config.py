"""The settings of a run: dataclasses, and presets as functions that return them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import tyro

from rcm.consistency import Form, TangentNorm
from rcm.sampling import MID_TIMES
from rcm.times import LogNormal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The diffusion transformer, rcm.dit.DiT."""

    dim: int = 64
    """Width of a token."""
    depth: int = 3
    """Number of blocks."""
    heads: int = 4
    """Attention heads; they divide the width."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay to zero."""

    lr: float
    """Learning rate at its highest."""
    warmup: int = 0
    """Iterations over which the learning rate rises."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of AdamW's two moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip: float = 1.0
    """Gradients are scaled down to this norm."""

    def __post_init__(self) -> None:
        _require_positive("lr", self.lr)
        _require_positive("clip", self.clip)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The diffusion model: flow matching on data."""

    iterations: int
    """Optimizer steps."""
    batch: int
    """Samples in one step."""
    optimizer: OptimizerConfig
    times: LogNormal
    """Distribution of the noise level."""
    ema_std: float
    """Relative width of the power-function average that becomes the teacher."""

    def __post_init__(self) -> None:
        _require_positive("iterations", self.iterations)
        _require_positive("batch", self.batch)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The distillation, rCM: a consistency loss and a score regulariser with a critic."""

    iterations: int
    """Iterations; each trains the student, the critic or both."""
    batch: int
    """Samples in one step."""
    student_every: int
    """The student is trained in one of so many iterations, once the tangent is warm."""
    optimizer: OptimizerConfig
    critic_optimizer: OptimizerConfig
    times: LogNormal
    """p_G, the noise levels of the consistency loss."""
    score_times: LogNormal
    """p_D, the noise levels of the score regulariser, the critic and the rollout."""
    tangent_warmup: int
    """Iterations over which the tangent's second term rises; the regulariser starts then."""
    critic_start: int
    """Iteration at which the critic's training starts, so that the regulariser finds it able."""
    form: Form = "rcm"
    """Which form of the tangent during its warm-up; see rcm.consistency."""
    tangent_norm: TangentNorm = "l2"
    """Norm of the tangent's normalisation."""
    c: float = 0.1
    """Added to the norm of the tangent."""
    score_weight: float
    """Weight of the regulariser; 0 leaves pure sCM, without a critic."""
    rollout_steps: int = 2
    """The student's own samples take 1 to this many steps."""
    ema: float
    """Decay of the moving average that becomes the student."""
    sigma_max: float = 80.0
    """Noise level that sampling starts from."""
    mid_times: tuple[float, ...] = MID_TIMES
    """Times of sampling steps 2, 3, ..."""

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "student_every", "c", "rollout_steps"):
            _require_positive(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides the numbers of a run."""

    preset: tyro.conf.Suppress[str]
    """The preset that these settings started from; the command line's first argument."""
    seed: int = 0
    """Of the weights, the data order and all noise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig
    student: StudentConfig
    report_every: int
    """Iterations between sample grids and metrics of the student."""
    checkpoint_every: int
    """Iterations between checkpoints."""

    def __post_init__(self) -> None:
        _require_positive("report_every", self.report_every)
        _require_positive("checkpoint_every", self.checkpoint_every)


def digits() -> RunConfig:
    """1797 real 8×8 digits on a CPU, from nothing to a student of one step in a few minutes."""
    return RunConfig(
        preset="digits",
        teacher=TeacherConfig(
            iterations=4000,
            batch=64,
            optimizer=OptimizerConfig(lr=2e-3, warmup=100),
            times=LogNormal(mean=-0.4, std=1.4),
            ema_std=0.1,
        ),
        student=StudentConfig(
            iterations=1200,
            batch=64,
            student_every=1,
            optimizer=OptimizerConfig(lr=1e-4),
            critic_optimizer=OptimizerConfig(lr=1e-4),
            times=LogNormal(mean=0.0, std=1.6),
            score_times=LogNormal(mean=0.0, std=1.6),
            tangent_warmup=600,
            critic_start=300,
            score_weight=0.1,
            ema=0.995,
        ),
        report_every=300,
        checkpoint_every=200,
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {"digits": digits}


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be positive")


def config_from_settings(settings: dict[str, Any]) -> RunConfig:
    """The configuration that a config.json describes.

    Raises:
        ValueError: its preset or a setting is unknown.
    """
    preset = settings.get("preset")
    if preset not in PRESETS:
        raise ValueError(f"the run's preset is {preset!r}; known are {', '.join(PRESETS)}")
    return _updated(PRESETS[preset](), settings)


def _updated(config: Any, settings: dict[str, Any]) -> Any:
    values = {}
    for name, value in settings.items():
        if not hasattr(config, name):
            raise ValueError(f"the run has a setting {name!r} that this version does not know")
        current = getattr(config, name)
        if is_dataclass(current):
            value = _updated(current, value)
        values[name] = tuple(value) if isinstance(current, tuple) else value
    return replace(config, **values)
