"""Staged rCM: dCM, then sCM, then DMD + sCM."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from rcm.losses.loss import Loss
from rcm.methods import scm
from rcm.methods.staged import StagedRCM
from rcm.presets import PRESETS, config_from_settings
from rcm.time_sampling import LogNormal
from rcm.training.ema import EMAConfig
from rcm.training.optimization import OptimizerConfig
from tests.rcm.methods.smooth_trainer import phases, smooth_trainer

TIMES = LogNormal(mean=0.0, std=1.0)
METHOD = StagedRCM(
    iterations=9,
    batch=4,
    optimizer=OptimizerConfig(lr=1e-3),
    critic_optimizer=OptimizerConfig(lr=1e-3),
    ema=EMAConfig(decay=0.9),
    discrete_iterations=3,
    continuous_iterations=4,
    times=TIMES,
    score_times=TIMES,
    tangent_warmup=2,
    critic_start=5,
)


def test_stages_follow_each_other_and_the_critic_starts_before_dmd() -> None:
    assert phases(smooth_trainer(METHOD)) == "x x x c c cf cf cdf cdf"


def test_the_critic_may_start_in_the_first_stage() -> None:
    assert phases(smooth_trainer(replace(METHOD, critic_start=2))).startswith("x x xf cf")


def test_student_and_critic_alternate_once_the_critic_starts() -> None:
    method = replace(METHOD, alternate=True, student_every=2, iterations=11)
    assert phases(smooth_trainer(method)) == "x x x c c c f cd f cd f"


@pytest.mark.parametrize(
    ("discrete", "continuous", "expected"),
    [(0, 7, "c c c"), (3, 0, "x x x cd cd cd"), (0, 0, "cd cd cd")],
)
def test_stages_can_be_left_out(discrete: int, continuous: int, expected: str) -> None:
    method = replace(
        METHOD,
        discrete_iterations=discrete,
        continuous_iterations=continuous,
        critic_start=8,
    )
    assert phases(smooth_trainer(method)).startswith(expected)


def test_the_tangent_warm_up_starts_with_the_second_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, loss = [], scm.consistency_loss

    def watched(*args: Any, warmup: float, **options: Any) -> Loss:
        seen.append(warmup)
        return loss(*args, warmup=warmup, **options)

    monkeypatch.setattr(scm, "consistency_loss", watched)
    phases(smooth_trainer(METHOD))
    assert seen == [0, 0.5, 1, 1, 1, 1]


def test_one_optimizer_and_one_average_continue_through_all_stages() -> None:
    trainer = smooth_trainer(METHOD)
    adamw = trainer.optimizations["student"].optimizer
    phases(trainer)
    assert {int(state["step"]) for state in adamw.state.values()} == {METHOD.iterations}
    assert trainer.averages["student"].updates == METHOD.iterations


@pytest.mark.parametrize(
    ("weight", "iteration"), [("discrete_weight", 0), ("consistency_weight", 3)]
)
def test_each_loss_has_a_weight_of_its_own(weight: str, iteration: int) -> None:
    def loss(**weights: float) -> float:
        torch.manual_seed(0)
        trainer = smooth_trainer(replace(METHOD, **weights))  # type: ignore[arg-type]
        trainer.iteration = iteration
        return trainer.step()["loss"]

    weights = dict.fromkeys(("discrete_weight", "consistency_weight", "score_weight"), 2.0)
    assert loss(**weights | {weight: 6.0}) == pytest.approx(3 * loss(**weights), rel=1e-6)


def test_the_target_of_the_first_stage_may_be_a_moving_average() -> None:
    trainer = smooth_trainer(replace(METHOD, target_decay=0.9))
    phases(trainer)
    assert trainer.averages["target"].updates == METHOD.iterations


@pytest.mark.parametrize("alternate", [False, True])
def test_a_dry_run_computes_every_loss(alternate: bool) -> None:
    method = replace(METHOD, student_every=5, alternate=alternate).shortened()
    assert set(phases(smooth_trainer(method))) >= set("xcdf")
    assert method.iterations <= 4


def test_a_run_that_ends_before_the_last_stage_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"discrete_iterations \+ continuous_iterations is 7; it must be less than 7",
    ):
        replace(METHOD, iterations=7)


def test_settings_survive_config_json() -> None:
    config = PRESETS["digits"].config("rcm-staged")
    changed = replace(config, student=replace(config.student, discrete_iterations=17))
    assert config_from_settings(json.loads(json.dumps(asdict(changed)))) == changed
