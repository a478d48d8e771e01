"""How the ranks of a run share its work: a mesh of data-parallel and context-parallel ranks.

    replicate × shard   data parallel: each group of context-parallel ranks has its own samples
    ring × ulysses      context parallel: these ranks share the tokens of the same samples

FSDP2 shards parameters over shard × ring × ulysses and keeps `replicate` copies of them (HSDP).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from rcm.errors import OptionError
from rcm.validation import require_integer


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh; their product is the number of ranks."""

    replicate: int = 1
    """Copies of the sharded parameters (HSDP), such as one for each node."""
    shard: int | None = None
    """Data-parallel ranks in each copy; by default all ranks that the other sizes leave."""
    ring: int = 1
    """Context-parallel ranks that pass keys and values around a ring."""
    ulysses: int = 1
    """Context-parallel ranks that exchange tokens for heads."""

    def __post_init__(self) -> None:
        require_integer(1, replicate=self.replicate, ring=self.ring, ulysses=self.ulysses)
        if self.shard is not None:
            require_integer(1, shard=self.shard)

    def sizes(self, ranks: int) -> tuple[int, int, int, int]:
        """(replicate, shard, ring, ulysses). Raises OptionError if they do not fit the ranks."""
        others = self.replicate * self.ring * self.ulysses
        shard = self.shard or max(1, ranks // others)
        if others * shard != ranks:
            raise OptionError(
                f"the mesh has replicate × shard × ring × ulysses = {self.replicate} × {shard} × "
                f"{self.ring} × {self.ulysses} = {others * shard} ranks, but the run has {ranks}; "
                "change --mesh.* or torchrun's --nproc-per-node and --nnodes"
            )
        return self.replicate, shard, self.ring, self.ulysses


class Layout:
    """The place of this rank in the mesh. Without a process group it is that of a single rank."""

    def __init__(self, config: MeshConfig | None = None, device_type: str = "cpu") -> None:
        """Every rank of the process group must construct it. Raises OptionError."""
        self.has_group = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.has_group else 0
        self.size = dist.get_world_size() if self.has_group else 1
        sizes = (config or MeshConfig()).sizes(self.size)
        replicate, shard, self.ring, self.ulysses = sizes
        self.data_size, self.context_size = replicate * shard, self.ring * self.ulysses
        self.data_rank = self.rank // self.context_size
        if not self.has_group:
            return
        names = ("replicate", "shard", "ring", "ulysses")
        self.mesh = init_device_mesh(device_type, sizes, mesh_dim_names=names)
        sharded = (replicate, self.size // replicate)
        self._parameters = init_device_mesh(
            device_type, sharded, mesh_dim_names=("replicate", "shard")
        )
        self._context = init_device_mesh(
            device_type, (self.data_size, self.context_size), mesh_dim_names=("data", "context")
        )

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files of the run and prints."""
        return self.rank == 0

    @property
    def parameter_mesh(self) -> DeviceMesh:
        """The mesh for FSDP2: (shard,), or (replicate, shard) if there are several copies."""
        has_copies = self._parameters.size(0) > 1
        return self._parameters if has_copies else self._parameters["shard"]

    @property
    def group(self) -> ProcessGroup | None:
        """All ranks of the run; None for a single one."""
        return dist.group.WORLD if self.size > 1 else None

    @property
    def shard_group(self) -> ProcessGroup:
        """The ranks that share one copy of the parameters."""
        return self._parameters.get_group("shard")

    @property
    def context_group(self) -> ProcessGroup:
        """The ranks that share the tokens of the same samples."""
        return self._context.get_group("context")

    def positions(self, batch: int, accumulation: int, *, name: str = "the batch") -> list[range]:
        """Positions in the batch of this rank's samples, for each of `accumulation` micro-batches.

        Raises OptionError unless data-parallel ranks × accumulation divides the batch; name is
        that of the batch, for the message.
        """
        parts = self.data_size * accumulation
        if batch % parts:
            raise OptionError(
                f"{name} is {batch}; it must be a multiple of {parts}, data-parallel ranks × "
                f"--accumulation = {self.data_size} × {accumulation}"
            )
        size = batch // parts
        own = range(self.data_rank * accumulation, (self.data_rank + 1) * accumulation)
        return [range(part * size, (part + 1) * size) for part in own]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all ranks: values (n,) float64 on the CPU -> the same on every rank."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def shard_sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks that share one copy of the parameters."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total, group=self.shard_group)
        return total

    def all(self, condition: bool) -> bool:
        """Whether the condition holds on every rank."""
        return bool(self.mean(torch.tensor([float(condition)], dtype=torch.float64)) == 1)
