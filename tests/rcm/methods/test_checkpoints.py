"""A checkpoint holds all that training changes: every network, average and optimizer."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rcm.training.checkpoint import Checkpoints
from rcm.training.trainer import Trainer
from tests.rcm.methods.digits_methods import METHODS, digits_trainer


def tensors(trainer: Trainer) -> dict[str, Tensor]:
    """The weights of all networks and averages."""
    found = {
        f"{role} {name}": weight.clone()
        for role, network in trainer.networks.items()
        for name, weight in network.state_dict().items()
    }
    for role, ema in trainer.averages.items():
        found |= {f"average of {role} {n}": weight.clone() for n, weight in ema.average.items()}
    return found


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The networks and averages that differ."""
    return {
        n.rpartition(" ")[0] for n, weight in after.items() if not torch.equal(weight, before[n])
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_network_and_average_is_restored(method: str, tmp_path: Path) -> None:
    trainer, restored = digits_trainer(method, 6), digits_trainer(method, 6)
    before = tensors(trainer)
    for _ in range(4):
        trainer.step()
    averages = {f"average of {role}" for role in trainer.averages}
    assert changed(before, tensors(trainer)) == {*trainer.networks, *averages} - {"teacher"}

    checkpoints = Checkpoints(tmp_path, ("student",))
    checkpoints.save("student", 4, trainer.state_dict(), {})
    saved, _ = checkpoints.latest()
    assert saved is not None
    state = restored.state_dict()
    checkpoints.load(saved, state)
    restored.load_state_dict(state)
    assert changed(tensors(trainer), tensors(restored)) == set()
    assert restored.step() == trainer.step()
