"""rCM: sCM during the tangent warm-up, then sCM and DMD."""

from dataclasses import replace
from typing import Any

import pytest

from rcm.losses.loss import Loss
from rcm.methods import scm
from rcm.methods.rcm import RCM
from rcm.time_sampling import LogNormal
from rcm.training.ema import EMAConfig
from rcm.training.optimization import OptimizerConfig
from tests.rcm.methods.smooth_trainer import phases, smooth_trainer

TIMES = LogNormal(mean=0.0, std=1.0)
METHOD = RCM(
    iterations=8,
    batch=4,
    optimizer=OptimizerConfig(lr=1e-3),
    critic_optimizer=OptimizerConfig(lr=1e-3),
    ema=EMAConfig(decay=0.9),
    times=TIMES,
    score_times=TIMES,
    tangent_warmup=4,
    critic_start=2,
)


def test_dmd_starts_after_the_tangent_warm_up_and_the_critic_before_it() -> None:
    assert phases(smooth_trainer(METHOD)) == "c c cf cf cdf cdf cdf cdf"


def test_student_and_critic_alternate_after_the_tangent_warm_up() -> None:
    method = replace(METHOD, alternate=True, student_every=3)
    assert phases(smooth_trainer(method)) == "c c c c cd f f cd"


def test_without_alternating_the_critic_is_trained_in_the_students_iterations_too() -> None:
    method = replace(METHOD, student_every=3)
    assert phases(smooth_trainer(method)) == "c c cf cf cdf f f cdf"


def test_the_average_follows_the_updates_of_the_student_alone() -> None:
    trainer = smooth_trainer(replace(METHOD, alternate=True, student_every=3))
    phases(trainer)
    assert trainer.averages["student"].updates == 6
    assert trainer.optimizations["student"].updates == 6
    assert trainer.optimizations["critic"].updates == 2


def test_tangent_warm_up_rises_linearly(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, loss = [], scm.consistency_loss

    def watched(*args: Any, warmup: float, **options: Any) -> Loss:
        seen.append(warmup)
        return loss(*args, warmup=warmup, **options)

    monkeypatch.setattr(scm, "consistency_loss", watched)
    phases(smooth_trainer(METHOD))
    assert seen == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]


def test_the_gradients_of_both_losses_are_compared() -> None:
    trainer = smooth_trainer(replace(METHOD, tangent_warmup=0))
    metrics = trainer.step()
    ratio = metrics["grad_norm_dmd"] / metrics["grad_norm_consistency"]
    assert metrics["grad_ratio_dmd"] == pytest.approx(ratio)


@pytest.mark.parametrize("alternate", [False, True])
def test_a_dry_run_computes_every_loss(alternate: bool) -> None:
    method = replace(METHOD, student_every=5, alternate=alternate, iterations=1000).shortened()
    words = phases(smooth_trainer(method))
    assert set(words) >= set("cdf")
    assert method.iterations <= 3
