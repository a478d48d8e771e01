"""A trainer with networks of a few hundred parameters."""

import torch

from rcm.data.dataset import Dataset
from rcm.training.method import Method
from rcm.training.trainer import Trainer
from tests.rcm.analytic_networks import SmoothNetwork

FEATURES = 4


def smooth_trainer(method: Method) -> Trainer:
    """Samples have FEATURES numbers, and one label. Every role has weights of its own."""
    networks = {role: SmoothNetwork(FEATURES, width=8) for role in method.roles()}
    data = Dataset(torch.randn(32, FEATURES), torch.zeros(32, dtype=torch.int64), 1)
    return Trainer("student", method, networks, data, seed=0)


def phases(trainer: Trainer) -> str:
    """A word for each iteration of the run: c for sCM, d for DMD, x for dCM, f for the critic."""
    marks = {"tangent_norm": "c", "dmd": "d", "discrete_consistency": "x", "critic_loss": "f"}
    words = []
    while trainer.iteration < trainer.iterations:
        metrics = trainer.step()
        words.append("".join(mark for name, mark in marks.items() if name in metrics))
    return " ".join(words)
