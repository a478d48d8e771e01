"""The preset `digits`: from 1797 real digits to a one-step student in a few minutes on a CPU."""

from rcm.data.digits import DigitsConfig
from rcm.methods.rcm import RCMConfig
from rcm.methods.teacher import TeacherConfig
from rcm.models.dit import DiTConfig
from rcm.time_sampling import LogNormal
from rcm.training.config import RunConfig
from rcm.training.optimization import OptimizerConfig


def digits() -> RunConfig:
    """A DiT with 242k parameters. Expected results: docs/digits.md."""
    return RunConfig(
        preset="digits",
        threads=1,
        data=DigitsConfig(),
        model=DiTConfig(dim=64, depth=3, heads=4),
        teacher=TeacherConfig(
            iterations=4000,
            batch=64,
            optimizer=OptimizerConfig(lr=2e-3, warmup=100),
            times=LogNormal(mean=-0.4, std=1.4),
            ema_std=0.1,
        ),
        student=RCMConfig(
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
