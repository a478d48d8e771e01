"""A trainer of sharded networks takes the steps of one whose networks are not sharded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jvp_attn import checkpoint_primal
from rcm.data.latents import Latents
from rcm.data.random_latents import write_random_latents
from rcm.distributed.layout import Layout
from rcm.distributed.processes import processes
from rcm.models.backbone import Backbone
from rcm.presets.pretrained import PRETRAINED
from rcm.presets.tiny import perturb
from rcm.run_pretrained import pretrained_network
from rcm.training.config import PretrainedConfig
from rcm.training.trainer import Trainer, build_networks

pytestmark = pytest.mark.xdist_group("ranks")

ITERATIONS = 8  # four updates of the student alone, then two of each network


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainedConfig:
    preset = PRETRAINED["wan-tiny"].config("wan-tiny", "rcm")
    folder = tmp_path_factory.mktemp("data")
    network = preset.model.build_on_meta()
    sizes = preset.data.condition_sizes(network.condition_shapes)
    write_random_latents(folder, 8, preset.data.sample_shape, sizes)
    return replace(preset, data=replace(preset.data, folder=str(folder)))


def unsharded(config: PretrainedConfig) -> Backbone:
    torch.manual_seed(config.seed)
    network = config.model.build()
    perturb(network)
    network.enable_gradient_checkpointing(checkpoint_primal)
    return network


def trained(config: PretrainedConfig, sharded: bool) -> tuple[list[float], dict[str, Tensor]]:
    """All losses, and the weights of all networks and averages."""

    def make(start: str) -> Backbone:
        if sharded:
            return pretrained_network(config, layout, torch.device("cpu"))
        return unsharded(config)

    layout = Layout()
    networks = build_networks(config.student.roles(), make)
    shapes = networks["teacher"].condition_shapes
    data: Latents = config.data.load(shapes)  # type: ignore[arg-type]
    trainer = Trainer("student", config.student, networks, data, seed=1, layout=layout)
    losses = []
    for _ in range(ITERATIONS):
        metrics = trainer.step()
        losses += [value for name, value in metrics.items() if name.endswith(("loss", "norm"))]
    weights = {
        name: tensor.full_tensor() if sharded and hasattr(tensor, "full_tensor") else tensor
        for name, tensor in trainer.state_dict().items()
        if name.startswith(("networks", "averages"))
    }
    return losses, weights


@pytest.fixture
def _one_rank() -> Iterator[None]:
    with processes("cpu", always_group=True):
        yield


@pytest.mark.usefixtures("_one_rank")
def test_losses_and_weights_are_those_without_shards(
    config: PretrainedConfig, tmp_path: Path
) -> None:
    expected_losses, expected = trained(config, sharded=False)
    losses, weights = trained(config, sharded=True)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        # AdamW turns rounding into steps of lr where a gradient is zero: biases of keys.
        atol = 2.0 * ITERATIONS * config.student.optimizer.lr if "to_k.bias" in name else 1e-6
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=atol, msg=name)
