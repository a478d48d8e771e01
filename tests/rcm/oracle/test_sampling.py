"""Rollouts, samplers and the coefficients of a wrapped network agree with rCM's published code."""

import pytest
import torch
from torch import Tensor

from rcm.sampling import MID_TIMES, consistency_sample, consistency_times
from rcm.time_conversions import t_from_u, u_from_t
from rcm.time_sampling import ShiftedUniform, rollout_times
from rcm.trigflow import denoise
from tests.rcm.oracle.stand_in import CONDITION, ORACLE, StandIn, assert_recorded, trigflow

STEPS = [1, 2, 3, 4]


class Recorder(StandIn):
    """The student, which keeps what it sees."""

    def __init__(self) -> None:
        super().__init__("student")
        self.inputs: list[Tensor] = []
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        self.inputs.append(x)
        self.times.append(time)
        return super().forward(x, time, condition)


def sample(network: StandIn, noise: Tensor, times: Tensor, fresh: Tensor) -> Tensor:
    net = trigflow(network)
    return consistency_sample(net, noise, times, CONDITION, noise_source=list(fresh)).detach()


@pytest.mark.parametrize("steps", STEPS)
def test_rollout_times(
    steps: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = iter(ORACLE["rollout_uniform"][..., 0])
    monkeypatch.setattr(torch, "rand", lambda *size, **options: next(draws))
    times = rollout_times(steps, 4, ShiftedUniform(shift=5.0), generator)
    assert_recorded(f"rollout{steps}_t", torch.cat([times, torch.zeros(1, 4)]))


@pytest.mark.parametrize("steps", STEPS)
def test_rollout(steps: int) -> None:
    student, t = Recorder(), ORACLE[f"rollout{steps}_t"][:-1]
    result = sample(student, ORACLE["rollout_noise"], t, ORACLE["rollout_fresh"])
    assert_recorded(f"rollout{steps}_sample", result)
    assert_recorded(f"rollout{steps}_net_timesteps", torch.stack(student.times))
    scale = (torch.cos(t) + torch.sin(t)).view(steps, 4, 1, 1, 1, 1)
    x = scale * torch.stack(student.inputs)
    assert_recorded(f"rollout{steps}_x", torch.cat([x, result[None]]))


def test_rollout_at_fixed_times() -> None:
    t = torch.tensor([torch.pi / 2, *MID_TIMES, 0], dtype=torch.float64)
    assert_recorded("rollout4fix_t", t[:, None].expand(-1, 4))
    result = sample(StandIn("student"), ORACLE["rollout_noise"], t[:-1], ORACLE["rollout_fresh"])
    assert_recorded("rollout4fix_sample", result)


@pytest.mark.parametrize("sampler", ["script", "sample"])
@pytest.mark.parametrize("steps", STEPS)
def test_samplers(sampler: str, steps: int) -> None:
    """Their script starts from sin(t) z, like consistency_sample; their model class from z."""
    student, t, noise = Recorder(), consistency_times(steps), ORACLE["sample_noise"]
    if sampler == "sample":
        noise = noise / torch.sin(t[0])
    result = sample(student, noise, t, ORACLE["sample_fresh"])
    assert_recorded(f"{sampler}{steps}_result", result)
    assert_recorded(f"{sampler}{steps}_net_x_first", student.inputs[0])
    assert_recorded(f"{sampler}{steps}_net_timesteps", torch.stack(student.times))


@pytest.mark.parametrize("steps", STEPS)
def test_times_of_the_script(steps: int) -> None:
    assert_recorded(
        f"script{steps}_u", u_from_t(torch.cat([consistency_times(steps), torch.zeros(1)]))
    )


def test_coefficients_of_a_rectified_flow_network() -> None:
    """x̂0 = c_skip x + c_out net(c_in x, c_noise), by networks that return 0 and 1."""
    t = ORACLE["coef_t"]
    one, zero = torch.ones_like(t)[:, None], torch.zeros_like(t)[:, None]
    seen = []

    def probe(x: Tensor, time: Tensor, condition: object) -> Tensor:
        seen.append((x[:, 0], time))
        return torch.zeros_like(x)

    assert_recorded("coef_c_skip", denoise(trigflow(probe), one, t, None)[:, 0])
    c_out = denoise(trigflow(lambda x, time, condition: one), zero, t, None)
    assert_recorded("coef_c_out", c_out[:, 0])
    ((c_in, c_noise),) = seen
    assert_recorded("coef_c_in", c_in)
    assert_recorded("coef_c_noise", c_noise)
    assert_recorded("coef_u", u_from_t(t))
    assert_recorded("coef_t_back", t_from_u(u_from_t(t)))
