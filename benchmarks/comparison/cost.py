"""What a training iteration costs: network evaluations for each sample of its batch.

The unit is the floating-point operations of one forward pass of the preset's network for one
sample, as torch counts them: the products of matrices, including those of attention. A JVP counts
about 2, a backward pass about 2.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from statistics import mean

import torch
from torch.utils.flop_counter import FlopCounterMode

from rcm.train import parse
from rcm.training.config import FromScratchConfig
from rcm.training.trainer import Trainer, build_networks

POINTS = 24  # evenly spaced iterations that are measured; the rollouts of DMD have random lengths
SAMPLES = 4  # in a batch; the cost of a sample does not depend on their number


def config_of(preset: str, method: str, options: tuple[str, ...] = ()) -> FromScratchConfig:
    """The settings of a run."""
    config = parse([preset, "--method", method, *options]).config
    assert isinstance(config, FromScratchConfig)
    return config


def trainer_of(config: FromScratchConfig) -> Trainer:
    """A trainer of the student with new weights, for measurements."""
    data = config.load_data()
    networks = build_networks(config.student.roles(), lambda _: config.build_network(data.facts))
    return Trainer("student", config.student, networks, data, seed=0)


@cache
def evaluations(preset: str, method: str, options: tuple[str, ...] = ()) -> float:
    """Network evaluations of a whole run, for each sample of a batch."""
    torch.set_num_threads(1)
    config = config_of(preset, method, options)
    trainer = trainer_of(replace(config, student=replace(config.student, batch=SAMPLES)))
    unit = _forward(preset)
    costs = []
    for point in range(POINTS):
        trainer.iteration = int((point + 0.5) * trainer.iterations / POINTS)
        with FlopCounterMode(display=False) as counter:
            trainer.step()
        costs.append(counter.get_total_flops() / SAMPLES / unit)
    return mean(costs) * trainer.iterations


@cache
def _forward(preset: str) -> float:
    """Operations of the forward pass of one sample, by the network of scm."""
    config = config_of(preset, "scm")
    data = config.load_data()
    x, labels = data.batch(range(SAMPLES))
    network = config.build_network(data.facts)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x, torch.ones(SAMPLES), labels)
    return counter.get_total_flops() / SAMPLES
