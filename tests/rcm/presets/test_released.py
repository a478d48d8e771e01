"""The released settings of rCM are those of its code and paper, and they train."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from rcm.data.dataset import Dataset
from rcm.presets.released import METHODS
from rcm.time_sampling import LogNormal, ShiftedUniform
from rcm.training.config import updated
from rcm.training.trainer import Trainer
from tests.rcm.analytic_networks import SmoothNetwork


@pytest.mark.parametrize("name", METHODS)
def test_a_short_run_trains_student_and_critic_with_finite_losses(name: str) -> None:
    method = replace(METHODS[name], batch=4).shortened()
    networks = {role: SmoothNetwork(4, width=8) for role in method.roles()}
    data = Dataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64), 1)
    trainer = Trainer("student", method, networks, data, seed=0)
    metrics = {}
    for _ in range(method.iterations):
        metrics |= trainer.step()
    assert {"loss", "dmd", "grad_ratio_dmd", "critic_loss"} <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("name", METHODS)
def test_settings_survive_json(name: str) -> None:
    method = METHODS[name]
    stored = json.loads(json.dumps(asdict(method)))
    assert updated(replace(method, batch=1, mid_times=()), stored) == method


def test_wan_1_3b() -> None:
    released, paper = METHODS["wan-1.3b-released"], METHODS["wan-1.3b-paper"]
    assert released.optimizer.lr == 2e-6
    assert released.critic_optimizer.lr == 4e-7
    assert released.student_every == 5
    assert released.tangent_warmup == 1000
    assert released.times == LogNormal(mean=0.7, std=1.6)
    assert released.score_times == ShiftedUniform(shift=5.0)
    assert released.guidance.scale == 5
    assert released.sigma_max == 80
    assert (released.batch, paper.batch) == (8, 256)
    assert (released.ema.std, paper.ema.std) == (0.1, 0.05)
    assert (released.mid_times, paper.mid_times) == ((1.5, 1.4, 1.0), (1.3, 1.0, 0.6))
    assert paper == replace(released, batch=paper.batch, ema=paper.ema, mid_times=paper.mid_times)


def test_wan_14b() -> None:
    released, paper = METHODS["wan-14b-released"], METHODS["wan-14b-paper"]
    assert released.optimizer.lr == 1e-6
    assert released.critic_optimizer.lr == 1e-7
    assert released.student_every == 10
    assert (released.tangent_warmup, paper.tangent_warmup) == (0, 200)
    assert (released.batch, paper.batch) == (4, 64)
    assert released.times == LogNormal(mean=1.5, std=1.6)
    assert released.sigma_max == 200


def test_cosmos() -> None:
    methods = [METHODS[f"cosmos-{size}-paper"] for size in ("0.6b", "2b", "14b")]
    assert [m.batch for m in methods] == [1024, 512, 256]
    assert [m.iterations for m in methods] == [80_000, 30_000, 25_000]
    for method in methods:
        assert method.optimizer.lr == 1e-6
        assert method.critic_optimizer.lr == 2e-7
        assert method.tangent_warmup == 0
        assert method.times == LogNormal(mean=-0.8, std=1.6)
        assert method.score_times == LogNormal(mean=0.0, std=1.6)
        assert method.guidance.scale == 4.5


@pytest.mark.parametrize("name", METHODS)
def test_the_trainer_is_the_same_in_all_runs(name: str) -> None:
    method = METHODS[name]
    for optimizer in (method.optimizer, method.critic_optimizer):
        assert (optimizer.schedule, optimizer.warmup) == ("constant", 100)
        assert (optimizer.betas, optimizer.weight_decay) == ((0.0, 0.999), 0.01)
        assert (optimizer.clip, optimizer.nonfinite) == (math.inf, "zero")
    assert (method.form, method.tangent_norm, method.tangent_norm_eps) == ("rcm", "l2", 0.1)
    assert (method.consistency_weight, method.score_weight) == (100, 1)
    assert method.alternate
    assert (method.rollout_length, method.rollout_steps) == ("cycle", 4)
