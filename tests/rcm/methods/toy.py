"""A mixture of five Gaussians in the plane, an MLP that learns it, and measures of a student.

    .venv/bin/python -m tests.rcm.methods.toy [METHOD ...]

trains a student by each method, and prints its errors and its mode coverage.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from rcm.data.dataset import Dataset
from rcm.guidance import Guidance
from rcm.losses.lcm import lcm_network
from rcm.losses.loss import Loss
from rcm.methods.lcm import LCM, SCHEDULE
from rcm.methods.samplers import FlowMap
from rcm.presets.methods import METHODS
from rcm.time_sampling import LogNormal
from rcm.training.ema import EMAConfig
from rcm.training.method import Averaged, Distillation, Frozen
from rcm.training.optimization import OptimizerConfig
from rcm.training.trainer import Trainer
from rcm.trigflow import Network, denoise, flow_map, interpolate
from tests.rcm.analytic_networks import GaussianMixture, train

TIMES = (0.3, 0.6, 0.9, 1.2, 1.5)
STEPS = (1, 2, 4)
TRAINING_TIMES = LogNormal(mean=0.0, std=1.6)

# Replace the settings of the preset where a method has them.
SETTINGS: dict[str, Any] = {
    "iterations": 600,
    "batch": 256,
    "optimizer": OptimizerConfig(lr=1e-3),
    "critic_optimizer": OptimizerConfig(lr=1e-3),
    "critic_start": 0,
    "score_weight": 1.0,
    "ema": EMAConfig(decay=0.98),
    "guidance": Guidance(),
    "tangent_warmup": 150,
}
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "rcm-staged": {"discrete_iterations": 150, "continuous_iterations": 250},
    # These have no derivative, and need more iterations to carry the data to the noise.
    "dcm": {"iterations": 1200},
    "lcm": {"iterations": 1000, "skip": 40},
}


def plane_mixture() -> GaussianMixture:
    """Two of the modes are close, one is light. Mean 0 and standard deviation 1, which is σd."""
    means = torch.tensor(
        [[-1.3, 0.9], [-0.5, 1.1], [1.2, 0.7], [0.9, -1.0], [-0.9, -1.2]], dtype=torch.float64
    )
    weights = torch.tensor([0.25, 0.2, 0.3, 0.2, 0.05], dtype=torch.float64)
    means, std = means - weights @ means, 0.18
    scale = torch.sqrt((weights @ means.square()).mean() + std**2).item()
    return GaussianMixture(means / scale, weights, std / scale)


MIXTURE = plane_mixture()


def plane_data(count: int = 1 << 15) -> Dataset:
    """Samples of the mixture, all with label 0."""
    samples, _ = MIXTURE.sample(count, Generator().manual_seed(1))
    return Dataset(samples.float(), torch.zeros(count, dtype=torch.int64), 1)


class PlaneNetwork(nn.Module):
    """F(x, t, end) of points in the plane. It ignores `end` until it is trained with one."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.first, self.end = nn.Linear(6, width), nn.Linear(4, width)
        self.rest = nn.Sequential(
            nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.last = nn.Linear(width, 2)
        nn.init.zeros_(self.end.weight)
        nn.init.zeros_(self.end.bias)

    def forward(
        self, x: Tensor, t: Tensor, condition: object = None, end: Tensor | None = None
    ) -> Tensor:
        h = self.first(torch.cat([x, _waves(t)], dim=1))
        if end is not None:
            h = h + self.end(_waves(t - end))
        return self.last(self.rest(h))


def _waves(t: Tensor) -> Tensor:
    return torch.stack([torch.sin(t), torch.cos(t), torch.sin(4 * t), torch.cos(4 * t)], dim=1)


class ExactTeacher(nn.Module):
    """The velocity of the mixture."""

    def forward(
        self, x: Tensor, t: Tensor, condition: object = None, end: Tensor | None = None
    ) -> Tensor:
        return MIXTURE.velocity(x, t)


def pretrained(iterations: int = 600) -> PlaneNetwork:
    """A network that has learned the velocity: the weights from which students start."""
    torch.manual_seed(0)
    network, generator, data = PlaneNetwork(), Generator().manual_seed(2), plane_data()

    def loss_of_step(step: int) -> Loss:
        x0 = data.samples[torch.randint(len(data.samples), (256,), generator=generator)]
        t = TRAINING_TIMES(256, generator).float()
        x = interpolate(x0, torch.randn(256, 2, generator=generator), t)
        return Loss((network(x, t) - MIXTURE.velocity(x, t)).square().mean(1), {})

    train(network, iterations, loss_of_step)
    return network


def toy_method(name: str) -> Distillation:
    """A method with settings for the mixture."""
    method = METHODS[name]
    known = {field.name for field in fields(method)}
    settings = {key: value for key, value in SETTINGS.items() if key in known}
    return replace(method, **settings | OWN_SETTINGS.get(name, {}))


def distilled(method: Distillation, start: nn.Module, seed: int = 0) -> nn.Module:
    """The averaged student after all iterations; networks start from the weights of `start`."""
    networks: dict[str, nn.Module] = {}
    for name, role in method.roles().items():
        networks[name] = ExactTeacher() if isinstance(role, Frozen) else PlaneNetwork()
        if not isinstance(role, Frozen):
            networks[name].load_state_dict(start.state_dict())
            networks[name].requires_grad_(not isinstance(role, Averaged))
    trainer = Trainer("student", method, networks, plane_data(), seed=seed)
    for _ in range(method.iterations):
        trainer.step()
    student = PlaneNetwork()
    student.load_state_dict(trainer.weights())
    return student


# ---- measures ----------------------------------------------------------------------------------


@cache
def exact_ends(count: int = 2000) -> list[tuple[Tensor, Tensor, Tensor]]:
    """t (count,), x at t and the end of the exact ODE (count, 2), for each of TIMES."""
    generator, found = Generator().manual_seed(3), []
    for time in TIMES:
        x0, _ = MIXTURE.sample(count, generator)
        noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
        t = torch.full((count,), time, dtype=torch.float64)
        x = interpolate(x0, noise, t)
        found.append((t, x, MIXTURE.ode_point(x, t, torch.zeros_like(t))))
    return found


@torch.no_grad()
def errors(method: Distillation | None, student: Network) -> list[float]:
    """Root mean square distance per element of f(x, t) to the end of the exact ODE, at TIMES.

    f is the student's consistency function; without a method it is the denoiser of a velocity.
    """
    if isinstance(method, LCM):
        student = lcm_network(student, SCHEDULE)
    found = []
    for t, x, exact in exact_ends():
        if isinstance(method, FlowMap):
            end = flow_map(student, x.float(), t, torch.zeros_like(t), None)
        else:
            end = denoise(student, x.float(), t, None)
        found.append((end - exact).square().mean().sqrt().item())
    return found


class Coverage(NamedTuple):
    """How samples are spread over the modes; a sample belongs to the mode whose mean is nearest."""

    variation: float
    """Total variation between the fractions of the samples and the weights of the modes, 0 to 1."""
    rarest: float
    """Smallest ratio of a fraction to its weight; 0 is a lost mode."""
    outside: float
    """Fraction of samples more than 4 standard deviations from every mean."""


def coverage(samples: Tensor) -> Coverage:
    distance, mode = torch.cdist(samples.double(), MIXTURE.means).min(1)
    fractions = torch.bincount(mode, minlength=len(MIXTURE.weights)) / len(samples)
    return Coverage(
        (fractions - MIXTURE.weights).abs().sum().item() / 2,
        (fractions / MIXTURE.weights).min().item(),
        (distance > 4 * MIXTURE.std).double().mean().item(),
    )


@torch.no_grad()
def coverages(method: Distillation, student: Network, count: int = 4000) -> list[Coverage]:
    """The coverage of samples in each of STEPS."""
    generator = Generator().manual_seed(4)
    noise, labels = (
        torch.randn(count, 2, generator=generator),
        torch.zeros(count, dtype=torch.int64),
    )
    return [coverage(method.sample(student, noise, labels, n, generator)) for n in STEPS]


def main(names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    start = pretrained()
    print("error at t =", *TIMES, "| total variation, rarest mode, outside, at steps", *STEPS)
    print("denoiser", *(f"{error:.3f}" for error in errors(None, MIXTURE.velocity)))
    for name in names or METHODS:
        method = toy_method(name)
        student = distilled(method, start)
        row = [f"{error:.3f}" for error in errors(method, student)]
        for found in coverages(method, student):
            row += ["|", *(f"{number:.3f}" for number in found)]
        print(name, *row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
