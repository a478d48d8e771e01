"""Saves and loads on several ranks, and a job that is killed meanwhile."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from rcm.errors import RunError
from rcm.training.checkpoint import Checkpoints
from rcm.training.ema import EMA, constant_decay
from tests.distributed.data_parallel_cases import network, point_and_direction

PHASES = ("teacher", "student")
Named = dict[str, Tensor]
Result = dict[str, Any]  # of training: "state" and "losses"


class Training:
    """A network under FSDP2, or in one process, with AdamW and an average.

    All ranks have the same batch, so that their number does not matter.
    """

    def __init__(self, mesh: DeviceMesh | None) -> None:
        self.model = network(torch.float32)
        if mesh is not None:
            for block in self.model:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.ema = EMA(self.model, constant_decay(0.9))
        self.step()  # which makes the moments, so that they can be filled

    def step(self) -> Tensor:
        x, _ = point_and_direction(torch.float32)
        loss = self.model(x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model)
        return loss.detach()

    def tensors(self) -> Named:
        weights = dict(self.model.named_parameters())
        moments = {
            f"{kind} of {name}": self.optimizer.state[weight][kind]
            for name, weight in weights.items()
            for kind in ("exp_avg", "exp_avg_sq", "step")
        }
        averages = {f"average of {name}": x for name, x in self.ema.average.items()}
        return {**weights, **moments, **averages}


def whole(tensors: Named) -> Named:
    return {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()
        for name, x in tensors.items()
    }


def other_tensors(mesh: DeviceMesh | None, value: int) -> Named:
    """Tensors of several dtypes and shardings; some ranks have no rows of some of them."""

    def sharded(x: Tensor, *placements: Shard | Replicate) -> Tensor:
        if mesh is None:
            return x.clone()
        return distribute_tensor(x, mesh, [Replicate()] * (mesh.ndim - 1) + list(placements))

    numbers = value * (torch.arange(15.0).reshape(5, 3) + 1)
    return {
        "uneven rows": sharded(numbers, Shard(0)),
        "columns": sharded(numbers.double(), Shard(1)),
        "one row": sharded(numbers[:1].bfloat16(), Shard(0)),
        "no row": sharded(numbers[:0], Shard(0)),
        "replicated": sharded(numbers, Replicate()),
        "bytes": sharded(numbers.to(torch.uint8), Shard(0)),
        "plain": numbers.clone(),
        "plain integer": torch.tensor(value),
        "plain empty": torch.empty(0, dtype=torch.int64),
    }


def raised(action: Callable[[], object]) -> str:
    """The class and message of what an action raises."""
    try:
        action()
    except (OSError, RunError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def loaded(checkpoints: Checkpoints, tensors: Named) -> Named:
    """The newest checkpoint, through the given tensors."""
    found, _ = checkpoints.latest()
    assert found is not None
    checkpoints.load(found, tensors)
    return whole(tensors)


def resumed(checkpoints: Checkpoints, mesh: DeviceMesh | None) -> Result:
    """A new training with the newest checkpoint: its state, and the loss of the next steps."""
    training = Training(mesh)
    state = loaded(checkpoints, training.tensors())
    return {"state": state, "losses": torch.stack([training.step(), training.step()])}


def trained(checkpoints: Checkpoints, mesh: DeviceMesh | None) -> Result:
    """Training that is saved after some steps: as `resumed`."""
    training = Training(mesh)
    training.step()
    state = whole(training.tensors())
    checkpoints.save("teacher", 2, training.tensors(), {"value": 2})
    losses = torch.stack([training.step(), training.step()])  # while it saves
    checkpoints.finish()
    return {"state": state, "losses": losses}


def cases(rank: int, folder: Path) -> dict[str, Any]:
    """All cases on this rank. `folder` has checkpoints of other numbers of ranks."""
    return {
        "training": training(folder),
        "replicas": replicas(folder),
        "errors": errors_of_rank_1(rank, folder),
    }


def training(folder: Path) -> dict[str, Result]:
    """Train, save and load on all ranks, and load what other numbers of ranks saved."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    own = Checkpoints(folder / str(dist.get_world_size()), PHASES, group=dist.group.WORLD)
    results = {"trained": trained(own, mesh)}
    for path in sorted(folder.glob("[0-9]")):
        results[path.name] = resumed(Checkpoints(path, PHASES, group=dist.group.WORLD), mesh)
    return results


def replicas(folder: Path) -> dict[str, Named]:
    """Save on (2, ranks / 2) = (replicate, shard), and load there and on a flattened mesh."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    checkpoints = Checkpoints(folder / "with replicas", PHASES, group=dist.group.WORLD)
    tensors = other_tensors(mesh, 1)
    checkpoints.save("teacher", 1, tensors, {})
    names = ("shard", "ring", "ulysses")
    parts = init_device_mesh("cpu", (ranks // 2, 2, 1), mesh_dim_names=names)
    flat = parts[names]._flatten("flat")
    return {
        "expected": whole(tensors),
        "same mesh": loaded(checkpoints, other_tensors(mesh, 0)),
        "flattened mesh": loaded(checkpoints, other_tensors(flat, 0)),
    }


def errors_of_rank_1(rank: int, folder: Path) -> dict[str, str]:
    """What every rank raises, and what is left in the folder."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    checkpoints = Checkpoints(folder / "failing", PHASES, group=dist.group.WORLD)
    outcomes = {}

    def save(iteration: int, tensors: Named) -> str:
        checkpoints.save("teacher", iteration, tensors, {"rank": rank})
        return raised(checkpoints.finish)

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    tensors = other_tensors(mesh, 1)
    outcomes["first"], outcomes["second"] = save(1, tensors), save(2, tensors)
    more = {"z": torch.empty(0)} if rank == 1 else {}
    outcomes["other tensors"] = save(3, {**tensors, **more})
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(os, "fsync", no_space)
        outcomes["full disk"] = save(4, tensors)
    dist.barrier()
    outcomes["left"] = " ".join(sorted(path.name for path in checkpoints.folder.iterdir()))
    others = other_tensors(mesh, 0)
    if rank == 1:
        others["more"] = torch.zeros(3)
    found, _ = checkpoints.latest()
    assert found is not None
    outcomes["other model"] = raised(lambda: checkpoints.load(found, others))
    outcomes["facts"] = str(found.facts)
    if rank == 1:
        next(found.path.glob("shard-00001-*")).unlink()
    dist.barrier()
    older, problems = checkpoints.latest()
    assert older is not None
    outcomes["older"] = older.path.name
    outcomes["problems"] = "; ".join(problems)
    return outcomes


def job(rank: int, ranks: int, folder: Path, dies_at: int) -> None:
    """Save in a loop, and print the iterations that are finished, until it is killed.

    dies_at: the fsync, counted from 0, in which the rank kills itself; -1 is never.
    """
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group(
        "gloo",
        init_method=rendezvous,
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=1),
    )
    mesh = init_device_mesh("cpu", (ranks,))
    checkpoints = Checkpoints(folder / "checkpoints", PHASES, group=dist.group.WORLD)
    found, problems = checkpoints.latest()
    assert not problems, problems
    start = 0
    if found is not None:
        start = found.manifest.iteration
        restored = other_tensors(mesh, 0)
        checkpoints.load(found, restored)
        expected = whole(other_tensors(mesh, start))
        assert all(torch.equal(x, expected[name]) for name, x in whole(restored).items())
    print(f"resumed {start}", flush=True)
    fsync, calls = os.fsync, iter(range(sys.maxsize))

    def deadly(descriptor: int) -> None:
        if next(calls) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = deadly
    for iteration in range(start + 1, sys.maxsize):
        checkpoints.save("student", iteration, other_tensors(mesh, iteration), {})
        checkpoints.finish()
        print(f"finished {iteration}", flush=True)


if __name__ == "__main__":
    job(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
