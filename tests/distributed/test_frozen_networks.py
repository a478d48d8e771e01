"""A network that is not trained keeps its shards in bfloat16, and computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rcm.distributed.layout import Layout
from rcm.distributed.processes import processes
from rcm.distributed.sharding import freeze, reshard, shard
from rcm.distributed.tensors import local_tensor
from rcm.models.backbone import Backbone
from rcm.models.diffusers import Architecture
from rcm.presets import PRESETS
from rcm.presets.tiny import perturb
from rcm.run_pretrained import pretrained_network
from rcm.training.config import PretrainedConfig
from tests.rcm.models.backbones import example

CPU = torch.device("cpu")
ARCHITECTURES: tuple[Architecture, ...] = ("wan", "cosmos", "sd3")


@pytest.fixture
def layout() -> Iterator[Layout]:
    with processes("cpu", always_group=True):
        yield Layout()


@pytest.fixture
def mesh(layout: Layout) -> DeviceMesh:
    return init_device_mesh("cpu", (layout.size,))


def config(architecture: Architecture, dtype: str, folder: Path | None = None) -> PretrainedConfig:
    preset = PRESETS[f"{architecture}-tiny"].config("rcm")
    assert isinstance(preset, PretrainedConfig)
    place = None if folder is None else str(folder)
    return replace(preset, model=replace(preset.model, dtype=dtype, folder=place))  # type: ignore[arg-type]


def saved(architecture: Architecture, folder: Path) -> Path:
    """Random weights in float32 files: bfloat16 rounds them."""
    network = config(architecture, "float32").model.build()
    perturb(network)
    network.model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def output(network: Backbone, architecture: Architecture) -> Tensor:
    with torch.no_grad():
        return network(*example(architecture))


@pytest.mark.parametrize("from_folder", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_frozen_network_computes_what_a_trained_one_does(
    architecture: Architecture, from_folder: bool, layout: Layout, tmp_path: Path
) -> None:
    folder = saved(architecture, tmp_path) if from_folder else None
    settings = config(architecture, "bfloat16", folder)
    trained = pretrained_network(settings, layout, CPU)
    frozen = pretrained_network(settings, layout, CPU, frozen=True)
    assert torch.equal(output(frozen, architecture), output(trained, architecture))
    reshard(trained)
    reshard(frozen)
    weights = dict(trained.named_parameters())
    for name, parameter in frozen.named_parameters():
        assert not parameter.requires_grad
        expected = local_tensor(weights[name].detach())
        assert expected.dtype == torch.float32
        assert torch.equal(local_tensor(parameter), expected.bfloat16())
    buffers = dict(trained.named_buffers())
    for name, buffer in frozen.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers[name])


def test_a_frozen_network_keeps_float32_where_it_computes_in_it(layout: Layout) -> None:
    network = pretrained_network(config("wan", "float32"), layout, CPU, frozen=True)
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_trained_shards_in_bfloat16_raise(mesh: DeviceMesh) -> None:
    network = torch.nn.Linear(2, 2)
    freeze(network, torch.bfloat16)
    network.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="all weights must be float32 master weights"):
        shard(network, [], mesh, data_size=1, param_dtype=torch.bfloat16)


def test_frozen_shards_of_another_dtype_than_the_computation_raise(mesh: DeviceMesh) -> None:
    network = torch.nn.Linear(2, 2)
    freeze(network, torch.float16)
    for dtype in (None, torch.bfloat16):
        with pytest.raises(ValueError, match=r"has dtype torch\.float16"):
            shard(network, [], mesh, data_size=1, param_dtype=dtype)
