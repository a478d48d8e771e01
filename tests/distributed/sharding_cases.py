"""A student's training step on shards: what each rank computes, and what one process expects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from jvp_attn import replace_sdpa
from rcm.distributed.sharding import accumulating_gradients, reset_iteration, reshard, shard
from rcm.losses.consistency import consistency_loss, consistency_tangent
from rcm.models.dit import DiT
from rcm.models.wan import WAN
from rcm.network_conversions import from_rectified_flow
from rcm.presets.tiny import TEXT_DIM, TEXT_LENGTH, VIDEO
from rcm.training.ema import EMA, constant_decay
from rcm.trigflow import Network, evaluate, interpolate, velocity
from tests.rcm.models.backbones import tiny_backbone

BATCH = 8
Named = dict[str, Tensor]


def wan(seed: int = 0) -> Any:
    """A transformer of diffusers. Two ranks divide some dimensions of its weights only."""
    return tiny_backbone("wan", heads=3, seed=seed, ffn_dim=33).model


def trigflow_network(model: nn.Module, dtype: torch.dtype = torch.float32) -> Network:
    """Its F, computed in dtype but for the time."""

    def network(x: Tensor, t: Tensor, text: Tensor, end: Tensor | None = None) -> Tensor:
        condition = {"prompt_embeds": text.to(dtype)}
        return WAN.predict(model, x.to(dtype), t.float(), condition).float()

    return from_rectified_flow(network, WAN.time_scale)


def data(batch: int) -> Named:
    """x0 and noise (batch, ...), times (batch,) float64, and a text, as consistency_loss takes."""
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, batch, *VIDEO, generator=generator)
    t = 0.2 + 1.2 * torch.rand(batch, generator=generator, dtype=torch.float64)
    text = torch.randn(batch, TEXT_LENGTH, TEXT_DIM, generator=generator)
    return {"x0": x0, "noise": noise, "t": t, "condition": text}


@dataclass(frozen=True)
class Case:
    """A layout of ranks, and how they compute a step on the batch."""

    name: str
    mesh: tuple[int, ...]
    data_size: int
    """Ranks with different samples; the others of a mesh compute the same ones."""
    dtype: torch.dtype | None = None
    micro_batches: int = 1

    @property
    def sharers(self) -> int:
        """Ranks that compute the same samples; their gradients are added."""
        ranks = 1
        for size in self.mesh:
            ranks *= size
        return ranks // self.data_size


TWO_RANKS = [
    Case("FSDP", (2,), 2),
    Case("FSDP-bf16", (2,), 2, torch.bfloat16),
    Case("FSDP-sum", (2,), 1),
    Case("FSDP-accumulated", (2,), 2, micro_batches=2),
    Case("copies", (2, 1), 2),
    Case("copies-accumulated", (2, 1), 2, micro_batches=2),
]
FOUR_RANKS = [
    Case("FSDP", (4,), 4),
    Case("HSDP", (2, 2), 4),
    Case("HSDP-bf16", (2, 2), 4, torch.bfloat16),
    Case("HSDP-sum", (2, 2), 2),
    Case("HSDP-accumulated", (2, 2), 4, micro_batches=2),
    Case("HSDP-accumulated-sum", (2, 2), 2, micro_batches=2),
]


def two_ranks(rank: int) -> dict[str, Any]:
    steps = {case.name: step_on_ranks(case, rank) for case in TWO_RANKS}
    mesh = init_device_mesh("cpu", (2,))
    return {
        "steps": steps,
        "averages": {
            case.name: averages(sharded(wan(), case), case.dtype)
            for case in TWO_RANKS
            if case.micro_batches == 1
        },
        "recovered": recovered(rank),
        "all-reduces": all_reduces(rank),
        "copies error": error_of_copies(wan(), data_size=1),
        "float64 error": error_of_copies(wan().double(), data_size=2),
        "teacher": forwards_recorded(mesh),
        "dit": dit_step(mesh, torch.bfloat16, slice(4 * rank, 4 * rank + 4)),
    }


def four_ranks(rank: int) -> dict[str, Any]:
    return {
        "steps": {case.name: step_on_ranks(case, rank) for case in FOUR_RANKS},
        "averages": {
            case.name: averages(sharded(wan(), case), case.dtype)
            for case in FOUR_RANKS
            if case.micro_batches == 1
        },
    }


def whole(named: dict[str, Tensor | None]) -> Named:
    """Complete tensors, the same on every rank."""
    return {
        name: x.full_tensor() if isinstance(x, DTensor) else x.clone()
        for name, x in named.items()
        if x is not None
    }


def gradients(network: nn.Module) -> Named:
    return whole({name: p.grad for name, p in network.named_parameters()})


def sharded(model: nn.Module, case: Case) -> nn.Module:
    names = ("replicate", "shard")[-len(case.mesh) :]
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=names)
    shard(model, model.blocks, mesh, data_size=case.data_size, param_dtype=case.dtype)
    return model


# ---- a student's step --------------------------------------------------------------------------


def step_on_ranks(case: Case, rank: int) -> dict[str, Any]:
    student, teacher = sharded(wan(), case), sharded(wan(seed=1).requires_grad_(False), case)
    return student_step(student, teacher, case, rank // case.sharers)


def student_step(
    student: nn.Module, teacher: nn.Module, case: Case, part: int = 0
) -> dict[str, Any]:
    """Losses and derivatives of a part of the batch, and the gradients of the mean loss."""
    size = BATCH // case.data_size
    dtype = case.dtype or torch.float32
    student_f, teacher_f = trigflow_network(student, dtype), trigflow_network(teacher, dtype)
    values, jvps = [], []
    for i, micro in enumerate(
        torch.arange(part * size, (part + 1) * size).chunk(case.micro_batches)
    ):
        samples = {name: x[micro] for name, x in data(BATCH).items()}
        last = i == case.micro_batches - 1
        with (
            replace_sdpa(),
            nullcontext() if last else accumulating_gradients(student),
        ):
            jvps.append(derivative(student_f, teacher_f, samples))
            loss = consistency_loss(student_f, **samples, teacher=teacher_f, tangent_norm="l2")
            (loss.value.mean() / case.micro_batches).backward()
        values.append(loss.value.detach())
    return {
        "values": torch.cat(values),
        "jvps": torch.cat(jvps),
        "gradients": gradients(student),
    }


def derivative(student: Any, teacher: Any, samples: Named) -> Tensor:
    x0, noise, t, text = samples.values()
    x = interpolate(x0, noise, t)
    with torch.no_grad():
        return consistency_tangent(student, x, t, velocity(x0, noise, t), text).jvp


# ---- a moving average --------------------------------------------------------------------------


def averages(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Named]:
    """A moving average over three updates; each follows a forward pass without a backward pass."""
    network = trigflow_network(model, dtype or torch.float32)
    ema = EMA(model, constant_decay(0.9))
    for i in range(3):
        output(network)
        reshard(model)
        for parameter in model.parameters():
            parameter.detach().mul_(1.1).add_(0.01 * i)
        output(network)
        ema.update(model)
    own = output(network)
    with ema.applied_to(model):
        averaged = output(network)
    found = {
        "average": whole(dict(ema.average)),
        "outputs": {"own": own, "averaged": averaged, "own again": output(network)},
    }
    output(network)
    ema.copy_to(model)
    found["outputs"]["copied"] = output(network)
    return found


@torch.no_grad()
def output(network: Any) -> Tensor:
    x0, noise, t, text = data(BATCH).values()
    with replace_sdpa():
        return evaluate(network, interpolate(x0, noise, t), t, text)


# ---- unusual courses ---------------------------------------------------------------------------


@contextmanager
def failing(block: nn.Module) -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise ValueError("in the middle")

    handle = block.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def recovered(rank: int) -> dict[str, Any]:
    """A step after one whose second micro-batch failed in the middle of the forward pass."""
    case = Case("", (2, 1), 2, micro_batches=2)
    student, teacher = sharded(wan(), case), sharded(wan(seed=1).requires_grad_(False), case)
    samples = {name: x[:1] for name, x in data(BATCH).items()}
    network, reference = trigflow_network(student), trigflow_network(teacher)
    with replace_sdpa(), accumulating_gradients(student):
        consistency_loss(network, **samples, teacher=reference).value.sum().backward()
        try:
            with failing(student.blocks[1]):
                consistency_loss(network, **samples, teacher=reference)
        except ValueError:
            reset_iteration(student)
    student.zero_grad()
    return student_step(student, teacher, case, rank)


def all_reduces(rank: int) -> list[int]:
    """Of the backward passes of a first and of a last micro-batch, between copies."""
    student = sharded(wan(), Case("", (2, 1), 2))
    x0, _, t, text = (x[rank : rank + 1] for x in data(BATCH).values())
    counts = []
    for context in (accumulating_gradients(student), nullcontext()):
        with context, CommDebugMode() as communication:
            evaluate(trigflow_network(student), x0, t, text).sum().backward()
        calls = communication.get_comm_counts().items()
        counts.append(sum(count for call, count in calls if "allreduce" in str(call)))
    return counts


def error_of_copies(model: nn.Module, data_size: int) -> str:
    try:
        sharded(model, Case("", (2, 1), data_size))
    except ValueError as error:
        return str(error)
    return ""


def forwards_recorded(mesh: DeviceMesh) -> list[int]:
    """The forward passes that a teacher remembers before and after it is reset."""
    teacher = wan().requires_grad_(False)
    shard(teacher, teacher.blocks, mesh, data_size=2)
    output(trigflow_network(teacher))
    assert isinstance(teacher, FSDPModule)
    order = teacher._get_fsdp_state()._comm_ctx.post_forward_order
    before = len(order)
    reset_iteration(teacher)
    return [before, len(order)]


# ---- a network of our own ----------------------------------------------------------------------


def dit(dtype: torch.dtype = torch.float32) -> DiT:
    torch.manual_seed(0)
    network = DiT(dim=24, depth=2, heads=2, learned_weight=True)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
    return network.to(dtype)


def dit_step(
    mesh: DeviceMesh | None, dtype: torch.dtype, part: slice = slice(None)
) -> dict[str, Any]:
    """A step of a DiT whose weight w(t) is called from outside of its forward."""
    network = dit(torch.float32 if mesh else dtype)
    if mesh:
        blocks = [*network.blocks, network.log_weight]
        shard(network, blocks, mesh, data_size=2, param_dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, BATCH, 1, 8, 8, generator=generator)
    t = 0.2 + 1.2 * torch.rand(BATCH, generator=generator, dtype=torch.float64)
    labels = torch.arange(BATCH)
    loss = consistency_loss(
        network,
        x0[part],
        noise[part],
        t[part],
        labels[part],
        log_weight=network.log_weight,
    )
    loss.value.mean().backward()
    return {"values": loss.value.detach(), "gradients": gradients(network)}
