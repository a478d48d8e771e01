"""What each iteration trains, at which rates and times, agrees with rCM's published code."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rcm.data.dataset import Dataset
from rcm.methods import dmd, scm
from rcm.presets.released import METHODS
from rcm.time_conversions import u_from_t
from rcm.time_sampling import LogNormal, ShiftedUniform, TimeDistribution
from rcm.training.ema import power_decay, power_gamma
from rcm.training.method import Step
from rcm.training.trainer import Trainer
from tests.rcm.analytic_networks import SmoothNetwork
from tests.rcm.oracle.stand_in import (
    CONDITION,
    ORACLE,
    UNCONDITION,
    StandIn,
    assert_recorded,
    trigflow,
)

RELEASED = METHODS["wan-1.3b-released"]
WITH_SHORT_WARMUP = replace(RELEASED, batch=2, tangent_warmup=3)


@pytest.fixture
def trainer() -> Trainer:
    """The released run with small networks and their warm-up of the phases."""
    torch.manual_seed(0)
    networks = {role: SmoothNetwork(4, width=8) for role in WITH_SHORT_WARMUP.roles()}
    data = Dataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64), 1)
    return Trainer("student", WITH_SHORT_WARMUP, networks, data, seed=0)


class Calls:
    """Calls of functions that still do their work, by name: what of_call makes of each."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.seen: dict[str, list[Any]] = defaultdict(list)

    def watch(
        self, owner: Any, function: str, name: str, of_call: Callable[..., Any] = lambda *a: 1
    ) -> None:
        original = getattr(owner, function)

        def watched(*args: Any, **options: Any) -> Any:
            self.seen[name].append(of_call(*args))
            return original(*args, **options)

        self.patch.setattr(owner, function, watched)

    def take(self, name: str) -> float:
        """What the only call since the last take made, or 0 if there was none."""
        seen = self.seen.pop(name, [0])
        assert len(seen) == 1, f"{name} was called {len(seen)} times in an iteration"
        return float(seen[0])


def record(values: dict[str, list[float]], name: str) -> None:
    assert_recorded(name, torch.tensor(values[name], dtype=torch.float64))


# ---- phases ------------------------------------------------------------------------------------


def test_student_critic_and_their_losses_and_rollouts_in_each_iteration(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    calls.watch(scm, "consistency_loss", "phase_scm")
    calls.watch(dmd, "score_loss", "phase_dmd")
    calls.watch(dmd, "flow_matching_loss", "critic loss")
    calls.watch(
        dmd, "consistency_sample", "phase_rollout_steps", lambda net, noise, times, c: len(times)
    )
    calls.watch(trainer.optimizations["student"].optimizer, "step", "phase_student", lambda: 1)
    calls.watch(trainer.optimizations["critic"].optimizer, "step", "phase_critic", lambda: 1)
    values = defaultdict(list)
    for _ in ORACLE["phase_iterations"]:
        trainer.step()
        for name in ("student", "scm", "dmd", "critic", "rollout_steps"):
            values[f"phase_{name}"].append(calls.take(f"phase_{name}"))
        assert calls.take("critic loss") == values["phase_critic"][-1]
        values["phase_effective"].append(trainer.averages["student"].updates - 1)
    for name in values:
        record(values, name)


# ---- losses ------------------------------------------------------------------------------------


class RecordedStep(Step):
    """An iteration with their networks and draws."""

    def __init__(self, iteration: int, critic_updates: int = 0) -> None:
        self.iteration, self.updates = iteration, {"student": 3, "critic": critic_updates}
        self.x0, self.condition = ORACLE["x0"], CONDITION
        self.stand_ins = {"student": StandIn("student"), "critic": StandIn("fake")}
        teacher = StandIn("teacher").requires_grad_(False)
        self._networks = {
            r: trigflow(n) for r, n in (self.stand_ins | {"teacher": teacher}).items()
        }
        self.noises: Iterator[Tensor] = iter(())

    def noise(self) -> Tensor:
        return next(self.noises)

    def null_condition(self, condition: Tensor) -> Tensor:
        return UNCONDITION.to(condition)


def rollout_noises(steps: int) -> list[Tensor]:
    """The noise of each step of a rollout."""
    return [ORACLE["rollout_noise"], *ORACLE["rollout_fresh"][: steps - 1]]


@pytest.fixture
def recorded_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of losses and rollouts are theirs."""

    def times(steps: int, *args: object) -> Tensor:
        return ORACLE[f"rollout{steps}_t"][:-1]

    draws = {RELEASED.score_times: "dmd_t", RELEASED.times: "scm_t"}
    monkeypatch.setattr(Step, "times", lambda step, p: ORACLE[draws[p]][:, 0])
    monkeypatch.setattr(Step, "draw", lambda step, f: f(len(step.x0), torch.Generator()))
    monkeypatch.setattr(dmd, "rollout_times", times)


@pytest.mark.usefixtures("recorded_draws")
@pytest.mark.parametrize(("iteration", "warmup"), [(0, "r0"), (300, "r03"), (1000, "r1")])
def test_losses_of_the_student(iteration: int, warmup: str) -> None:
    """Both losses with their weights and guidance; the fourth update has a rollout of 4 steps."""
    step = RecordedStep(iteration)
    step.noises = iter([ORACLE["scm_noise"], *rollout_noises(4), ORACLE["d_noise"]])
    ((role, terms),) = RELEASED.losses(step)
    assert role == "student"
    student = step.stand_ins["student"]
    assert_recorded(f"scm_{warmup}_loss", terms["consistency"].value)
    assert_recorded(f"scm_{warmup}_grad_student", student.gradient(terms["consistency"].value))
    assert ("dmd" in terms) == (iteration >= RELEASED.tangent_warmup)
    if "dmd" in terms:
        assert_recorded("dmd4_loss", terms["dmd"].value)
        assert_recorded("dmd4_grad_student", student.gradient(terms["dmd"].value))


@pytest.mark.usefixtures("recorded_draws")
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_loss_of_the_critic(steps: int) -> None:
    step = RecordedStep(1001, critic_updates=steps - 1)
    step.noises = iter([*rollout_noises(steps), ORACLE["d_noise"]])
    ((role, terms),) = RELEASED.losses(step)
    assert role == "critic"
    assert_recorded(f"critic{steps}_loss", terms["flow matching"].value)
    critic = step.stand_ins["critic"]
    assert_recorded(f"critic{steps}_grad_fake", critic.gradient(terms["flow matching"].value))


# ---- learning rate and average -----------------------------------------------------------------


@pytest.mark.parametrize("role", ["student", "critic"])
def test_learning_rate_after_updates_of_the_network_itself(
    trainer: Trainer, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer continues as if the network had had that many updates."""
    optimization, calls = trainer.optimizations[role], Calls(monkeypatch)
    calls.watch(
        optimization.optimizer, "step", "lr", lambda: optimization.optimizer.param_groups[0]["lr"]
    )
    factors = []
    for updates in ORACLE["lr_steps"].tolist():
        trainer.iteration = 0 if role == "student" else WITH_SHORT_WARMUP.tangent_warmup + 1
        optimization.updates = int(updates)
        trainer.step()
        factors.append(calls.take("lr") / optimization.config.lr)
    assert_recorded("lr_factor", torch.tensor(factors, dtype=torch.float64))


def test_decay_of_the_average_in_each_update_of_the_student(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    average = trainer.averages["student"]
    betas, decay = [], average.decay

    def watched(update: int) -> float:
        betas.append(decay(update))
        return betas[-1]

    monkeypatch.setattr(average, "decay", watched)
    for effective in ORACLE["ema_iterations"].tolist():
        trainer.iteration, average.updates = 0, int(effective)
        trainer.step()
    assert_recorded("ema_0p1_beta", torch.tensor(betas, dtype=torch.float64))


@pytest.mark.parametrize(("name", "rate"), [("ema_0p1", 0.1), ("ema_0p05", 0.05)])
def test_power_function_decay(name: str, rate: float) -> None:
    """Their iterations count from 0, our updates from 1."""
    assert_recorded(f"{name}_gamma", torch.tensor(power_gamma(rate), dtype=torch.float64))
    decay = power_decay(rate)
    betas = [decay(int(i) + 1) for i in ORACLE["ema_iterations"].tolist()]
    assert_recorded(f"{name}_beta", torch.tensor(betas, dtype=torch.float64))


# ---- times -------------------------------------------------------------------------------------


def draw(distribution: TimeDistribution, recorded: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Times from recorded normal or uniform numbers."""
    numbers = ORACLE[recorded].flatten()
    for name in ("rand", "randn"):
        monkeypatch.setattr(torch, name, lambda *size, **options: numbers)
    return distribution(len(numbers), torch.Generator())


@pytest.mark.parametrize(("name", "mean"), [("pG_0p7", 0.7), ("pG_1p5", 1.5)])
def test_times_of_the_consistency_loss(
    name: str, mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution = LogNormal(mean=mean, std=1.6)
    t = draw(distribution, "time_normals", monkeypatch)
    assert_recorded(f"{name}_t", t)
    assert_recorded(f"{name}_u", u_from_t(t))
    if mean == 0.7:
        assert_recorded("scm_t", draw(distribution, "scm_normal", monkeypatch))


def test_times_of_the_score_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    distribution = ShiftedUniform(shift=5.0)
    t = draw(distribution, "time_uniforms", monkeypatch)
    assert_recorded("pD_t", t)
    assert_recorded("pD_u", u_from_t(t))
    assert_recorded("dmd_t", draw(distribution, "d_uniform", monkeypatch))
