"""DMD2: when student and critic are trained, and where the student's samples come from."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rcm.losses.loss import Norm
from rcm.methods import dmd
from rcm.methods.dmd import DMD
from rcm.time_sampling import LogNormal
from rcm.training.ema import EMAConfig
from rcm.training.optimization import OptimizerConfig
from tests.rcm.methods.smooth_trainer import FEATURES, phases, smooth_trainer

METHOD = DMD(
    iterations=8,
    batch=4,
    optimizer=OptimizerConfig(lr=1e-2),
    critic_optimizer=OptimizerConfig(lr=1e-2),
    ema=EMAConfig(decay=0.9),
    score_times=LogNormal(mean=0.0, std=1.0),
)


def test_both_networks_are_trained_in_every_iteration() -> None:
    assert phases(smooth_trainer(METHOD)) == "df df df df df df df df"


def test_the_student_can_be_trained_less_often() -> None:
    assert phases(smooth_trainer(replace(METHOD, student_every=3))) == "df f f df f f df f"


def test_the_critic_can_start_later() -> None:
    assert phases(smooth_trainer(replace(METHOD, critic_start=6))) == "d d d d d d df df"


def test_student_and_critic_can_alternate() -> None:
    method = replace(METHOD, student_every=4, alternate=True)
    assert phases(smooth_trainer(method)) == "d f f f d f f f"


def test_the_critic_is_trained_on_samples_of_the_updated_student(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer, weights = smooth_trainer(METHOD), []
    sample = dmd.consistency_sample

    def watched(net: Any, *args: Any, **options: Any) -> Tensor:
        weights.append((torch.is_grad_enabled(), next(net.parameters()).detach().clone()))
        return sample(net, *args, **options)

    monkeypatch.setattr(dmd, "consistency_sample", watched)
    trainer.step()
    (student_grad, before), (critic_grad, after) = weights
    assert student_grad
    assert not critic_grad
    assert not torch.equal(before, after)


Rollouts = dict[str, list[Tensor]]


def rollouts(method: DMD, monkeypatch: pytest.MonkeyPatch) -> Rollouts:
    """Times of each rollout of a run, by the network that it trains."""
    seen: Rollouts = {"student": [], "critic": []}
    sample = dmd.consistency_sample

    def watched(net: Any, noise: Tensor, times: Tensor, *args: Any, **options: Any) -> Tensor:
        seen["student" if torch.is_grad_enabled() else "critic"].append(times)
        return sample(net, noise, times, *args, **options)

    monkeypatch.setattr(dmd, "consistency_sample", watched)
    phases(smooth_trainer(method))
    return seen


@pytest.mark.parametrize("role", ["student", "critic"])
def test_rollouts_have_random_lengths_and_decreasing_times_from_pure_noise(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = rollouts(replace(METHOD, rollout_steps=3, iterations=30), monkeypatch)[role]
    assert {len(times) for times in seen} == {1, 2, 3}
    for times in seen:
        assert times.shape[1:] == (METHOD.batch,)
        assert (times[0] == math.pi / 2).all()
        assert (times[1:] <= times[:-1]).all()


def test_lengths_of_rollouts_cycle_for_student_and_critic_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = replace(METHOD, rollout_steps=3, rollout_length="cycle", student_every=2)
    seen = rollouts(method, monkeypatch)
    assert [len(times) for times in seen["student"]] == [1, 2, 3, 1]
    assert [len(times) for times in seen["critic"]] == [1, 2, 3, 1, 2, 3, 1, 2]


def test_rollouts_can_use_the_times_of_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    method = replace(METHOD, rollout_steps=4, rollout_length="cycle", rollout_at_mid_times=True)
    first, second, third, fourth, *_ = rollouts(method, monkeypatch)["student"]
    assert first.tolist() == [math.pi / 2]
    assert second.tolist() == [math.pi / 2, 1.5]
    assert third.tolist() == [math.pi / 2, 1.5, 1.4]
    assert fourth.tolist() == [math.pi / 2, 1.5, 1.4, 1.0]


def test_critic_norm_l2_sums_over_the_elements() -> None:
    def loss(norm: Norm) -> float:
        torch.manual_seed(0)
        return smooth_trainer(replace(METHOD, critic_norm=norm)).step()["critic_loss"]

    assert loss("l2") == pytest.approx(FEATURES * loss("rms"), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alternate": True}, "student_every is 1; with alternate it must be at least 2"),
        (
            {"rollout_at_mid_times": True, "rollout_steps": 5},
            "rollout_steps is 5; with rollout_at_mid_times it must be at most 4",
        ),
        ({"rollout_length": "all"}, "one of random, cycle"),
        ({"critic_norm": "l1"}, "critic_norm is 'l1'"),
    ],
)
def test_settings_that_contradict_each_other_raise(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(METHOD, **settings)
