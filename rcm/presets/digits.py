"""The preset `digits`: from 1797 real digits to a few-step student in a few minutes on a CPU."""

from collections.abc import Callable
from dataclasses import replace

from rcm.data.digits import DigitsConfig
from rcm.guidance import Guidance
from rcm.methods.ayf import AYF
from rcm.methods.dcm import DCM
from rcm.methods.dmd import DMD
from rcm.methods.flow_matching import FlowMatching
from rcm.methods.improved_mean_flow import ImprovedMeanFlow
from rcm.methods.lcm import LCM
from rcm.methods.mean_flow import MeanFlow
from rcm.methods.rcm import RCM
from rcm.methods.scm import SCM
from rcm.methods.sct import SCT
from rcm.methods.staged import StagedRCM
from rcm.methods.tvm import TVM
from rcm.models.dit import DiTConfig
from rcm.time_pairs import UniformEnd
from rcm.time_sampling import LogNormal
from rcm.training.config import RunConfig
from rcm.training.ema import EMAConfig
from rcm.training.method import Distillation
from rcm.training.optimization import OptimizerConfig

TIMES = LogNormal(mean=0.0, std=1.6)
MODEL = DiTConfig(dim=64, depth=3, heads=4)
# A teacher without the optional parts loads into these too.
MODELS = {
    "imeanflow": replace(MODEL, null_class=True, guidance_input=True, auxiliary_head=True),
}


def config(method: str) -> RunConfig:
    """A DiT with 250k parameters and one of METHODS. Expected results: docs/digits.md."""
    return RunConfig(
        preset="digits",
        method=method,
        threads=1,
        data=DigitsConfig(),
        model=MODELS.get(method, MODEL),
        teacher=FlowMatching(
            iterations=4000,
            batch=64,
            optimizer=OptimizerConfig(lr=2e-3, warmup=100),
            times=LogNormal(mean=-0.4, std=1.4),
            ema=EMAConfig(std=0.1),
        ),
        student=METHODS[method](),
        report_every=300,
        checkpoint_every=200,
    )


def _scm() -> SCM:
    return SCM(
        iterations=1200,
        batch=64,
        optimizer=OptimizerConfig(lr=1e-4),
        ema=EMAConfig(decay=0.995),
        times=TIMES,
        tangent_warmup=600,
    )


def _sct() -> SCT:
    return SCT(
        iterations=1200,
        batch=64,
        optimizer=OptimizerConfig(lr=1e-4),
        ema=EMAConfig(decay=0.995),
        times=TIMES,
        tangent_warmup=600,
    )


def _rcm() -> RCM:
    return RCM(
        iterations=1200,
        batch=64,
        optimizer=OptimizerConfig(lr=1e-4),
        critic_optimizer=OptimizerConfig(lr=1e-4),
        ema=EMAConfig(decay=0.995),
        times=TIMES,
        score_times=TIMES,
        tangent_warmup=600,
        critic_start=300,
        score_weight=0.1,
    )


def _rcm_staged() -> StagedRCM:
    return StagedRCM(
        iterations=1200,
        batch=64,
        optimizer=OptimizerConfig(lr=1e-4),
        critic_optimizer=OptimizerConfig(lr=1e-4),
        ema=EMAConfig(decay=0.995),
        discrete_iterations=200,
        teacher_steps=16,
        shift=1.0,
        solver="heun",
        continuous_iterations=600,
        times=TIMES,
        tangent_warmup=0,
        score_times=TIMES,
        critic_start=600,
        score_weight=0.1,
    )


def _dmd() -> DMD:
    return DMD(
        iterations=300,
        batch=64,
        optimizer=OptimizerConfig(lr=1e-4),
        critic_optimizer=OptimizerConfig(lr=1e-4),
        ema=EMAConfig(decay=0.995),
        score_times=TIMES,
    )


def _dcm() -> DCM:
    return DCM(
        iterations=1200,
        batch=64,
        optimizer=OptimizerConfig(lr=1e-4),
        ema=EMAConfig(decay=0.995),
        teacher_steps=16,
        shift=1.0,
        solver="heun",
        norm="rms",
    )


def _ayf() -> AYF:
    return AYF(
        iterations=1200,
        batch=64,
        optimizer=OptimizerConfig(lr=1e-4),
        ema=EMAConfig(decay=0.995),
        time_pairs=UniformEnd(times=TIMES),
        tangent_warmup=300,
    )


def _lcm() -> LCM:
    return LCM(
        iterations=1200,
        batch=64,
        optimizer=OptimizerConfig(lr=1e-4),
        ema=EMAConfig(decay=0.995),
    )


def _meanflow() -> MeanFlow:
    # The paper's times, LogNormal(mean=-0.4, std=1), almost never reach the noise that one-step
    # sampling starts from, and its weight 1 / (e + 1e-3) gives errors near zero, which are those
    # at end = t, up to 1000 times the weight of the others.
    return MeanFlow(
        iterations=1200,
        batch=64,
        optimizer=OptimizerConfig(lr=1e-4),
        ema=EMAConfig(decay=0.995),
        time_pairs=UniformEnd(times=TIMES),
        tangent_warmup=300,
        norm="rms",
        power=0.5,
        eps=0.01,
    )


def _imeanflow() -> ImprovedMeanFlow:
    return ImprovedMeanFlow(
        iterations=1200,
        batch=64,
        optimizer=OptimizerConfig(lr=1e-4),
        ema=EMAConfig(decay=0.995),
        guidance=Guidance(scale=1.0, max_scale=8.0),
        time_pairs=UniformEnd(times=TIMES),
        tangent_warmup=300,
        norm="rms",
        power=0.5,
        eps=0.01,
    )


def _tvm() -> TVM:
    return TVM(
        iterations=1200,
        batch=64,
        optimizer=OptimizerConfig(lr=1e-4),
        ema=EMAConfig(decay=0.995),
        time_pairs=UniformEnd(times=TIMES),
        flow_matching_times=TIMES,
    )


METHODS: dict[str, Callable[[], Distillation]] = {
    "rcm": _rcm,
    "scm": _scm,
    "sct": _sct,
    "dmd": _dmd,
    "dcm": _dcm,
    "rcm-staged": _rcm_staged,
    "lcm": _lcm,
    "meanflow": _meanflow,
    "imeanflow": _imeanflow,
    "ayf": _ayf,
    "tvm": _tvm,
}
