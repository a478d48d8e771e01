"""What the layout of some meshes is on each rank."""

from __future__ import annotations

import torch
import torch.distributed as dist

from rcm.distributed.agreement import errors_on_every_rank
from rcm.distributed.layout import Layout, MeshConfig
from rcm.errors import OptionError, RunError


def places(rank: int) -> dict[str, list[int]]:
    """Of 4 ranks: the ranks of this one's groups, and the samples of a batch of 8."""
    found: dict[str, list[int]] = {}
    for name, config in {
        "dp4": MeshConfig(),
        "dp2 x U2": MeshConfig(ulysses=2),
        "R2 x U2": MeshConfig(ring=2, ulysses=2),
        "HSDP": MeshConfig(replicate=2),
        "HSDP x R2": MeshConfig(replicate=2, shard=1, ring=2),
    }.items():
        layout = Layout(config)
        found[f"{name} samples"] = [i for part in layout.positions(8, 1) for i in part]
        found[f"{name} halves"] = [len(part) for part in layout.positions(8, 2)]
        found[f"{name} context"] = dist.get_process_group_ranks(layout.context_group)
        found[f"{name} shard"] = dist.get_process_group_ranks(layout.shard_group)
        found[f"{name} mesh"] = list(layout.parameter_mesh.shape)
        found[f"{name} sum"] = [int(layout.shard_sum(torch.tensor(10**rank)))]
    return found


def agreements(rank: int) -> dict[str, str]:
    """Of 2 ranks: means, conditions, and errors of one rank."""
    layout, found = Layout(), {}
    mean = layout.mean(torch.tensor([float(rank), 5.0], dtype=torch.float64))
    found["mean"] = str(mean.tolist())
    found["all"] = str([layout.all(True), layout.all(rank == 0), layout.all(False)])
    for kind in (RunError, OptionError, OSError, TypeError):
        try:
            with errors_on_every_rank():
                if rank == 1:
                    raise kind("of rank 1: größer")
        except Exception as error:
            found[kind.__name__] = f"{type(error).__name__}: {error}"
    with errors_on_every_rank():
        pass
    try:
        MeshConfig(ring=3).sizes(layout.size)
    except OptionError as error:
        found["mesh"] = str(error)
    return found
