"""Every method on a mixture of five Gaussians in the plane, whose ODE is known exactly.

    python benchmarks/mixture.py [METHOD ...]

trains a small MLP by each method, within seconds. Prints its errors and how its samples are spread
over the modes, and draws results/mixture.png: the samples of one step, in the colour of the mode
that the exact ODE leads their noise to.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from rcm.data.dataset import Dataset
from rcm.gaussian_mixture import GaussianMixture
from rcm.guidance import Guidance
from rcm.losses.lcm import lcm_network
from rcm.methods.lcm import LCM, SCHEDULE
from rcm.methods.samplers import FlowMap
from rcm.presets.methods import METHODS
from rcm.time_sampling import LogNormal
from rcm.training.ema import EMAConfig
from rcm.training.method import Averaged, Distillation, Frozen
from rcm.training.optimization import OptimizerConfig
from rcm.training.trainer import Trainer
from rcm.trigflow import Network, denoise, flow_map, interpolate

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

    def error() -> Tensor:
        x0 = data.samples[torch.randint(len(data.samples), (256,), generator=generator)]
        t = TRAINING_TIMES(256, generator).float()
        x = interpolate(x0, torch.randn(256, 2, generator=generator), t)
        return (network(x, t) - MIXTURE.velocity(x, t)).square().mean()

    _fit(network, error, iterations)
    return network


def _fit(network: nn.Module, loss: Callable[[], Tensor], iterations: int) -> None:
    """Adam with a learning rate that falls to 0."""
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, iterations)
    for _ in range(iterations):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def mixture_method(name: str) -> Distillation:
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
def samples(method: Distillation, student: Network, steps: int, count: int = 4000) -> Tensor:
    """Samples (count, 2) from the first noise of `noise(count)`."""
    labels = torch.zeros(count, dtype=torch.int64)
    return method.sample(student, noise(count), labels, steps, Generator().manual_seed(5))


def noise(count: int = 4000) -> Tensor:
    return torch.randn(count, 2, generator=Generator().manual_seed(4))


def coverages(method: Distillation, student: Network) -> list[Coverage]:
    """The coverage of samples in each of STEPS."""
    return [coverage(samples(method, student, steps)) for steps in STEPS]


# ---- the script --------------------------------------------------------------------------------


def main(names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    start = pretrained()
    print("error at t =", *TIMES, "| total variation, rarest mode, outside, at steps", *STEPS)
    print("denoiser", *(f"{error:.3f}" for error in errors(None, MIXTURE.velocity)))
    z = noise().double()
    t = torch.full((len(z),), torch.pi / 2, dtype=torch.float64)
    ends = MIXTURE.ode_point(z, t, torch.zeros_like(t))
    panels = {"noise": z, "exact ODE": ends}
    for name in names or METHODS:
        method = mixture_method(name)
        student = distilled(method, start)
        row = [f"{error:.3f}" for error in errors(method, student)]
        for found in coverages(method, student):
            row += ["|", *(f"{number:.3f}" for number in found)]
        print(name, *row, flush=True)
        panels[name] = samples(method, student, 1)
    draw(Path(__file__).parent / "results" / "mixture.png", panels, MIXTURE.nearest_mode(ends))


def draw(path: Path, panels: dict[str, Tensor], modes: Tensor) -> None:
    """Scatter plots, in the colours of the modes (count,)."""
    from matplotlib.figure import Figure

    columns = -(-len(panels) // 2)
    figure = Figure(figsize=(1.75 * columns, 3.9), layout="constrained")
    for number, (title, points) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(2, columns, number)
        axis.scatter(*points.T, c=[f"C{mode}" for mode in modes], s=0.6, linewidths=0)
        axis.scatter(*MIXTURE.means.T, marker="+", color="black", linewidths=0.8, s=25)
        axis.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
