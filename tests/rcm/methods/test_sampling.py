"""How the students of some methods are sampled."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from rcm.guidance import Guidance, GuidedCondition
from rcm.methods.lcm import SCHEDULE
from tests.rcm.methods.digits_methods import digits_config

NOISE, LABELS = torch.ones(2, 1, 8, 8), torch.tensor([3, 4])


class Calls:
    """A network that records its arguments and returns zero."""

    def __init__(self) -> None:
        self.times: list[Tensor] = []
        self.conditions: list[Any] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Any, end: Tensor | None = None) -> Tensor:
        self.times.append(t)
        self.conditions.append(condition)
        return torch.zeros_like(x)


def test_lcm_samples_at_the_timesteps_of_its_paper() -> None:
    net, method = Calls(), digits_config("lcm", 4, skip=20).student
    method.sample(net, NOISE, LABELS, 4, Generator().manual_seed(0))
    timesteps = [SCHEDULE.timestep(t)[0].item() for t in net.times]
    assert timesteps == pytest.approx([999, 759, 499, 259], abs=1e-2)
    with pytest.raises(ValueError, match=r"steps is 51; it must be an integer in 1\.\.50"):
        method.sample(net, NOISE, LABELS, 51, Generator())


def test_imeanflow_samples_with_its_guidance_as_an_input() -> None:
    net, method = Calls(), digits_config("imeanflow", 4).student
    guided = replace(
        method, guidance=Guidance(max_scale=8.0, interval=(0.2, 1.4)), sample_scale=3.0
    )  # type: ignore[call-arg]
    guided.sample(net, NOISE, LABELS, 2, Generator())
    for condition in net.conditions:
        assert isinstance(condition, GuidedCondition)
        assert torch.equal(condition.condition, LABELS)
        assert condition.scale.tolist() == [3.0, 3.0]
        assert condition.low.tolist() == pytest.approx([0.2, 0.2])
        assert condition.high.tolist() == pytest.approx([1.4, 1.4])


def test_imeanflow_without_guidance_takes_the_labels_alone() -> None:
    net, method = Calls(), replace(digits_config("imeanflow", 4).student, guidance=Guidance())
    method.sample(net, NOISE, LABELS, 2, Generator())
    assert all(torch.equal(condition, LABELS) for condition in net.conditions)
    assert net.times[0].tolist() == pytest.approx([math.atan(80)] * 2)


def test_a_student_is_sampled_at_other_mid_times_than_its_rollouts() -> None:
    """With one mid time there are two steps, fewer than those of the rollouts in training."""
    settings = {"rollout_at_mid_times": True, "rollout_steps": 4}
    net, method = Calls(), digits_config("rcm", 4, **settings).student
    method.with_mid_times((0.9,)).sample(net, NOISE, LABELS, 2, Generator().manual_seed(0))
    assert [t[0].item() for t in net.times] == pytest.approx([math.atan(80), 0.9])
