"""Weights of a folder, loaded into the shards of every rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from jvp_attn import replace_sdpa
from rcm.distributed.loading import load_pretrained
from rcm.distributed.pretrained_folder import PretrainedFolder
from rcm.distributed.sharding import shard
from rcm.distributed.stored_tensors import StoredTensor
from rcm.models.diffusers import ADAPTERS, Architecture
from tests.rcm.models.backbones import example, tiny_backbone


def build(architecture: Architecture) -> nn.Module:
    """A tiny network of diffusers. Two ranks divide some dimensions of its weights only."""
    settings = {"ffn_dim": 33} if architecture == "wan" else {}
    return tiny_backbone(architecture, heads=3, **settings).model


def save(
    architecture: Architecture,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    size: str = "30KB",
) -> None:
    """As diffusers saves it, in several files."""
    model: Any = build(architecture).to(dtype)
    model.save_pretrained(folder, max_shard_size=size)


def remade_buffers(architecture: Architecture, folder: Path) -> dict[str, Tensor]:
    """The buffers of the same network with one block."""
    network_class: Any = type(build(architecture))
    config = {**PretrainedFolder.open(folder).config, "num_layers": 1}
    return dict(network_class.from_config(config).named_buffers())


def meta(architecture: Architecture, folder: Path) -> nn.Module:
    """The network without memory for its weights."""
    network_class: Any = type(build(architecture))
    with torch.device("meta"):
        return network_class.from_config(PretrainedFolder.open(folder).config)


def load(
    architecture: Architecture,
    folder: Path,
    mesh: tuple[int, ...] | None = None,
    data_size: int = 1,
) -> nn.Module:
    network = meta(architecture, folder)
    if mesh is not None:
        names = ("replicate", "shard")[-len(mesh) :]
        [blocks] = (getattr(network, name) for name in ADAPTERS[architecture].blocks)
        device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=names)
        shard(network, blocks, device_mesh, data_size=data_size)
    load_pretrained(network, folder, remake_buffers=lambda: remade_buffers(architecture, folder))
    return network


def contents(architecture: Architecture, network: nn.Module) -> dict[str, Tensor]:
    """Weights, all buffers and the output."""
    adapter = ADAPTERS[architecture]
    x, t, condition = example(architecture)
    with torch.no_grad(), replace_sdpa():
        output = adapter.predict(network, x, adapter.time_scale * t, condition)
    tensors = {**network.state_dict(), **dict(network.named_buffers())}
    whole = {n: y.full_tensor() if isinstance(y, DTensor) else y for n, y in tensors.items()}
    return {**whole, "output": output}


# ---- ranks -------------------------------------------------------------------------------------

LOADED_ON_TWO: tuple[Architecture, ...] = ("wan", "sd3")


def two_ranks(rank: int, folders: dict[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for architecture in LOADED_ON_TWO:
        read = count_reads()
        network = load(architecture, folders[architecture], (2,), 2)
        local = sum(y.to_local().numel() for y in network.parameters() if isinstance(y, DTensor))
        found[architecture] = {
            "contents": contents(architecture, network),
            "bytes read": sum(read),
            "local parameters": local,
        }
    return {**found, "errors": errors(rank, folders)}


def four_ranks(rank: int, folders: dict[str, Path]) -> dict[str, Tensor]:
    return contents("cosmos", load("cosmos", folders["cosmos"], (2, 2), 4))


def count_reads() -> list[int]:
    """The bytes of every read from now on."""
    read: list[int] = []
    original = StoredTensor.read_rows

    def counting(self: StoredTensor, file: Any, start: int, rows: int) -> Tensor:
        tensor = original(self, file, start, rows)
        read.append(tensor.nbytes)
        return tensor

    StoredTensor.read_rows = counting  # type: ignore[method-assign]
    return read


def errors(rank: int, folders: dict[str, Path]) -> dict[str, str]:
    """Errors that only rank 1 meets at first."""
    own = folders[f"of rank {rank}"]
    missing = own / "none" if rank == 1 else own
    remade = remade_buffers("wan", own)
    found = {
        "missing": error_of(
            lambda: load_pretrained(meta("wan", own), missing, remake_buffers=lambda: remade)
        )
    }

    def truncate_on_one_rank() -> dict[str, Tensor]:
        """After the headers were read."""
        if rank == 1:
            path = sorted(own.glob("*.safetensors"))[0]
            path.write_bytes(path.read_bytes()[:-1])
        return remade

    found["truncated meanwhile"] = error_of(
        lambda: load_pretrained(meta("wan", own), own, remake_buffers=truncate_on_one_rank)
    )
    return found


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"
