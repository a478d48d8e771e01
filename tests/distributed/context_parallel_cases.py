"""Networks of diffusers whose tokens are split among ranks, and the same networks in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import jvp
from torch.utils.checkpoint import checkpoint

from jvp_attn import checkpoint_jvp, replace_sdpa, scaled_dot_product_attention
from rcm.distributed.context_parallel import ContextParallel
from rcm.distributed.token_plans import token_plan
from rcm.losses.consistency import consistency_loss
from rcm.network_conversions import from_rectified_flow

BATCH, WIDTH, TEXT_WIDTH = 2, 4, 12
Named = dict[str, Tensor]
Attention = Callable[..., Tensor]


# ----------------------------------------------------------------------------
# Networks. Images have 15 tokens, videos 45, and texts 7.


def wan(heads: int) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=12,
        in_channels=WIDTH,
        out_channels=WIDTH,
        text_dim=TEXT_WIDTH,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=64,
    )


def cosmos(heads: int, positions: str | None = None) -> nn.Module:
    from diffusers import CosmosTransformer3DModel

    return CosmosTransformer3DModel(
        in_channels=WIDTH,
        out_channels=WIDTH,
        num_attention_heads=heads,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=1.0,
        text_embed_dim=TEXT_WIDTH,
        adaln_lora_dim=4,
        max_size=(8, 16, 16),
        concat_padding_mask=False,
        extra_pos_embed_type=positions,
    )


def sd3(heads: int) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=WIDTH,
        out_channels=WIDTH,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=heads,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=8 * heads,
        pooled_projection_dim=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def flux(heads: int) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=WIDTH,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=heads,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=4,
        axes_dims_rope=(4, 4, 4),
    )


def _pooled(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, 4, dtype=x.dtype).expand(len(x), 4)


def _flux_arguments(x: Tensor) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij")
    positions = torch.stack([torch.zeros(15), rows.flatten(), columns.flatten()], 1)
    return {"pooled_projections": _pooled(x), "img_ids": positions, "txt_ids": torch.zeros(7, 3)}


@dataclass(frozen=True)
class Kind:
    """A class of networks."""

    build: Callable[[int], nn.Module]
    blocks: tuple[str, ...]
    sample: tuple[int, ...]
    arguments: Callable[[Tensor], dict[str, Any]] = lambda x: {}
    dtype: torch.dtype = torch.float64


_VIDEO = (WIDTH, 3, 6, 10)
KINDS = {
    "wan": Kind(wan, ("blocks",), _VIDEO, dtype=torch.float32),  # computes in float32
    "cosmos": Kind(cosmos, ("transformer_blocks",), _VIDEO, lambda x: {"fps": 16}),
    "cosmos1": Kind(
        partial(cosmos, positions="learnable"),
        ("transformer_blocks",),
        _VIDEO,
        lambda x: {"fps": 16},
        dtype=torch.float32,  # as are its learned positions
    ),
    "sd3": Kind(
        sd3, ("transformer_blocks",), (WIDTH, 6, 10), lambda x: {"pooled_projections": _pooled(x)}
    ),
    "flux": Kind(
        flux, ("transformer_blocks", "single_transformer_blocks"), (15, WIDTH), _flux_arguments
    ),
}


def network(kind: Kind, heads: int, seed: int) -> nn.Module:
    """A network without layers of zeros, which would hide the layers before them."""
    torch.manual_seed(seed)
    model = kind.build(heads)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
    return model.to(kind.dtype)


def batch(kind: Kind) -> Named:
    """Samples, noise, text and times; (batch, ...) each."""
    generator = torch.Generator().manual_seed(1)
    randn = partial(torch.randn, dtype=torch.float64, generator=generator)
    return {
        "x0": randn(BATCH, *kind.sample).to(kind.dtype),
        "noise": randn(BATCH, *kind.sample).to(kind.dtype),
        "condition": randn(BATCH, 7, TEXT_WIDTH).to(kind.dtype),
        "t": torch.tensor([0.4, 1.2], dtype=torch.float64),
    }


# ----------------------------------------------------------------------------
# Layouts of ranks


@dataclass(frozen=True)
class Layout:
    """How many ranks share the samples, and the tokens of each sample."""

    data: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def ranks(self) -> int:
        return self.data * self.ring * self.ulysses

    def mesh(self) -> DeviceMesh:
        names = ("data", "ring", "ulysses")
        return init_device_mesh("cpu", (self.data, self.ring, self.ulysses), mesh_dim_names=names)


def groups(mesh: DeviceMesh) -> dict[str, ProcessGroup]:
    """The groups that ContextParallel takes."""
    return {
        "ring": mesh["ring"].get_group(),
        "ulysses": mesh["ulysses"].get_group(),
        "group": mesh["ring", "ulysses"]._flatten("context").get_group(),
    }


def shard(model: nn.Module, kind: Kind, mesh: DeviceMesh) -> None:
    """Shard over all ranks. Gradients are summed over ranks that share samples."""
    flat = mesh["data", "ring", "ulysses"]._flatten("all")
    for name in kind.blocks:
        for block in model.get_submodule(name):
            fully_shard(block, mesh=flat)
    fully_shard(model, mesh=flat)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(float(mesh["data"].size()))
            module.set_force_sum_reduction_for_comms(True)


# ----------------------------------------------------------------------------
# What is computed


@dataclass(frozen=True)
class Case:
    kind: str
    heads: int
    sharded: bool = False

    def __str__(self) -> str:
        return f"{self.kind}-{self.heads}-heads" + ("-sharded" if self.sharded else "")


def trigflow(model: nn.Module, kind: Kind, attention: Attention) -> Callable[..., Tensor]:
    """The network as rcm sees it."""

    def raw(x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        with replace_sdpa(attention):
            return model(
                hidden_states=x,
                timestep=time,
                encoder_hidden_states=text,
                **kind.arguments(x),
                return_dict=False,
            )[0]

    return from_rectified_flow(raw, time_scale=10.0)


def step(
    student: nn.Module,
    teacher: nn.Module,
    kind: Kind,
    attention: Attention,
    teacher_attention: Attention,
    of_batch: Named,
    gradients: Callable[[nn.Module], Named],
) -> Named:
    """The consistency loss, and a loss of a JVP with its gradients through the tangent."""
    net = trigflow(student, kind, attention)
    teacher_net = trigflow(teacher, kind, teacher_attention)
    loss = consistency_loss(
        net, **of_batch, teacher=teacher_net, form="rcm", tangent_norm="l2", tangent_norm_eps=10.0
    )
    loss.value.mean().backward()
    found = {"value": loss.value, "jvp_norm": loss.diagnostics["jvp_norm"]}
    found |= {f"gradient of {name}": g for name, g in gradients(student).items()}

    student.zero_grad()
    x, text, noise = (of_batch[name] for name in ("x0", "condition", "noise"))
    t = of_batch["t"].to(torch.promote_types(x.dtype, torch.float32))
    out, tangent = jvp(lambda x, t: net(x, t, text), (x, t), (noise, torch.ones_like(t)))
    found |= {"out": out, "tangent": tangent}
    (out.square().mean() + tangent.square().mean()).backward()
    found |= {f"through the tangent, {name}": g for name, g in gradients(student).items()}
    return {name: y.detach().clone() for name, y in found.items()}


@cache
def in_one_process(case: Case) -> Named:
    kind = KINDS[case.kind]
    student, teacher = network(kind, case.heads, 0), network(kind, case.heads, 1)

    def gradients(model: nn.Module) -> Named:
        return {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}

    attention = scaled_dot_product_attention
    return step(student, teacher, kind, attention, attention, batch(kind), gradients)


def on_ranks(case: Case, mesh: DeviceMesh) -> Named:
    kind = KINDS[case.kind]
    student, teacher = network(kind, case.heads, 0), network(kind, case.heads, 1)
    parallel = [
        ContextParallel(model, token_plan(model), **groups(mesh)) for model in (student, teacher)
    ]
    if case.sharded:
        for model in (student, teacher):
            shard(model, kind, mesh)

    def gradients(model: nn.Module) -> Named:
        return {
            name: _whole(w.grad, mesh)
            for name, w in model.named_parameters()
            if w.grad is not None
        }

    attention, teacher_attention = (p.attention for p in parallel)
    samples = _part(mesh)
    of_batch = {name: x[samples] for name, x in batch(kind).items()}
    return step(student, teacher, kind, attention, teacher_attention, of_batch, gradients)


def _part(mesh: DeviceMesh) -> slice:
    size = BATCH // mesh["data"].size()
    start = mesh["data"].get_local_rank() * size
    return slice(start, start + size)


def _whole(grad: Tensor, mesh: DeviceMesh) -> Tensor:
    """The gradient of the mean over all samples."""
    if isinstance(grad, DTensor):
        return grad.full_tensor()
    grad = grad.clone()
    dist.all_reduce(grad)
    return grad / mesh["data"].size()


def outcomes(cases: dict[Layout, list[Case]], rank: int) -> dict[str, dict[str, Named]]:
    """What this rank computes, by layout and case."""
    found: dict[str, dict[str, Named]] = {}
    for layout, of_layout in cases.items():
        mesh = layout.mesh()
        found[str(layout)] = {str(case): on_ranks(case, mesh) for case in of_layout}
    return found


# ----------------------------------------------------------------------------
# Checkpoints, of which the backward pass comes after a call with another number of tokens

CHECKPOINTS: dict[str, Callable[..., Any]] = {
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "checkpoint_jvp": checkpoint_jvp,
}


def with_checkpoints(name: str | None, model: nn.Module, attention: Attention) -> Named:
    """Gradients of two calls with 45 and 46 tokens, of which 2 ranks have 23 each."""
    if name is not None:
        model.enable_gradient_checkpointing(gradient_checkpointing_func=CHECKPOINTS[name])
    net = trigflow(model, KINDS["wan"], attention)
    values = batch(KINDS["wan"])
    t = values["t"].float()
    lengths = [(3, 6, 10), (1, 4, 46)]
    losses = []
    with replace_sdpa(attention):
        for size in lengths:
            x = values["x0"].flatten(1)[:, : WIDTH * 180].unflatten(1, (WIDTH, 180))
            x = torch.cat([x, x], -1)[..., : size[0] * size[1] * size[2]].unflatten(-1, size)
            if name in (None, "checkpoint_jvp"):
                call = lambda x, t: net(x, t, values["condition"])  # noqa: E731
                out, tangent = jvp(call, (x, t), (x.flip(0), torch.ones_like(t)))
                losses.append(out.square().sum() + tangent.square().sum())
            else:
                losses.append(net(x.requires_grad_(), t, values["condition"]).square().sum())
        (losses[0] + 2 * losses[1]).backward()
    return {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}


@contextmanager
def counted_messages(counts: dict[str, int]) -> Iterator[None]:
    """Count the calls of torch's collectives, by name."""
    names = ("all_to_all_single", "batch_isend_irecv", "all_gather_single")

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        return call

    with (
        patch.object(dist, names[0], counted(names[0])),
        patch.object(dist, names[1], counted(names[1])),
        patch.object(dist, names[2], counted(names[2])),
    ):
        yield
