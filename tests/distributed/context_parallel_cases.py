"""Networks of diffusers whose tokens are split among ranks, and the same in one process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
from rcm.distributed.token_plans import TOKEN_PLANS, TokenPlan, Tokens, token_plan
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
    return model if kind.dtype == torch.float32 else model.to(kind.dtype)


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
            name: _whole(w.grad, mesh) for name, w in model.named_parameters() if w.grad is not None
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
# Checkpoints

CHECKPOINTS: dict[str, Callable[..., Any]] = {
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "checkpoint_jvp": checkpoint_jvp,
}
# Of 45 and of 46 tokens, each of two ranks has 23.
LENGTHS = [(3, 6, 10), (1, 4, 46)]


def after_another_call(model: nn.Module, attention: Attention, method: str | None) -> Named:
    """Gradients of calls with 45 and 46 tokens, all of whose backward passes come at the end.

    With "reentrant" and "non-reentrant" the losses are those of the output, otherwise of a JVP.
    """
    if method is not None:
        model.enable_gradient_checkpointing(gradient_checkpointing_func=CHECKPOINTS[method])
    net = trigflow(model, KINDS["wan"], attention)
    generator = torch.Generator().manual_seed(2)
    text = batch(KINDS["wan"])["condition"]
    t = torch.tensor([0.4, 1.2])
    losses = {}
    for i, size in enumerate(LENGTHS):
        x, tx = torch.randn(2, BATCH, WIDTH, *size, generator=generator)
        x.requires_grad_()  # as reentrant checkpoints need
        losses[f"output {i}"] = net(x, t, text).square().sum()
        if method in (None, "checkpoint_jvp"):
            out, tangent = jvp(lambda x, t: net(x, t, text), (x, t), (tx, torch.ones_like(t)))
            losses[f"jvp {i}"] = (out * tangent).sum()
    found = {}
    for name, loss in losses.items():
        model.zero_grad()
        with replace_sdpa(attention):  # torch's checkpoints compute blocks again here
            loss.backward()
        for weight_name, w in model.named_parameters():
            if w.grad is not None:
                found[f"{name}, {weight_name}"] = w.grad.clone()
    return found


def checkpoint_outcomes(mesh: DeviceMesh) -> dict[str, Named]:
    found = {}
    for method in CHECKPOINTS:
        model = network(KINDS["wan"], 3, 0)
        parallel = ContextParallel(model, token_plan(model), **groups(mesh))
        shares = after_another_call(model, parallel.attention, method)
        found[method] = {name: _whole(grad, mesh) for name, grad in shares.items()}
    return found


# ----------------------------------------------------------------------------
# A time for each token or frame


def with_times_of_tokens(kind: str, attention: Attention, model: nn.Module) -> Named:
    """The output, and the gradients of its square."""
    of_batch = batch(KINDS[kind])
    generator = torch.Generator().manual_seed(3)
    shape = (BATCH, 45) if kind == "wan" else (BATCH, 1, 3, 1, 1)
    times = 10 * torch.rand(shape, generator=generator)
    with replace_sdpa(attention):
        out = model(of_batch["x0"], times, of_batch["condition"], return_dict=False)[0]
        out.square().mean().backward()
    gradients = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
    return {"out": out.detach(), **gradients}


def time_outcomes(mesh: DeviceMesh) -> dict[str, Named]:
    found = {}
    for kind in ("wan", "cosmos"):
        model = network(KINDS[kind], 3, 0)
        parallel = ContextParallel(model, token_plan(model), **groups(mesh))
        of_kind = with_times_of_tokens(kind, parallel.attention, model)
        found[kind] = {name: y if name == "out" else _whole(y, mesh) for name, y in of_kind.items()}
    return found


# ----------------------------------------------------------------------------
# Messages and errors


def messages(mesh: DeviceMesh) -> dict[str, int]:
    """How often a JVP of a Wan of two layers calls torch's collectives, by name."""
    counts: dict[str, int] = {}

    def counted(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        return patch.object(dist, name, call)

    kind = KINDS["wan"]
    model = network(kind, 4, 0)
    parallel = ContextParallel(model, token_plan(model), **groups(mesh))
    net, of_batch = trigflow(model, kind, parallel.attention), batch(kind)
    x, t = of_batch["x0"], of_batch["t"].float()
    with ExitStack() as stack:
        for name in ("all_to_all_single", "batch_isend_irecv", "all_gather_single"):
            stack.enter_context(counted(name))
        jvp(lambda x, t: net(x, t, of_batch["condition"]), (x, t), (x, t))
    return counts


def errors(mesh: DeviceMesh) -> dict[str, str]:
    """Messages, by what is wrong."""
    kind = KINDS["wan"]
    of_groups = groups(mesh)

    def parallel(plan: TokenPlan | None = None, **changed: ProcessGroup) -> ContextParallel:
        model = network(kind, 2, 0)
        return ContextParallel(model, plan or token_plan(model), **{**of_groups, **changed})

    def attend(**options: Any) -> None:
        """Call attention with these options in a module that attends to all tokens."""
        model = network(kind, 2, 0)
        state = ContextParallel(model, token_plan(model), **of_groups)

        def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            changed = {name: f(query) if callable(f) else f for name, f in options.items()}
            return state.attention(query, *args, **{**kwargs, **changed})

        x = batch(kind)
        with replace_sdpa(attention):
            model(x["x0"], x["t"].float(), x["condition"])

    def twice() -> None:
        model = network(kind, 2, 0)
        for _ in range(2):
            ContextParallel(model, token_plan(model), **of_groups)

    def unsplit() -> None:
        model = network(kind, 2, 0)
        plan = replace(token_plan(model), inputs={}, results={})
        state = ContextParallel(model, plan, **of_groups)
        trigflow(model, kind, state.attention)(*(batch(kind)[x] for x in ("x0", "t", "condition")))

    def under_other_attention() -> None:
        model = network(kind, 2, 0)
        ContextParallel(model, token_plan(model), **of_groups)
        net = trigflow(model, kind, scaled_dot_product_attention)
        net(*(batch(kind)[x] for x in ("x0", "t", "condition")))

    wan_plan = TOKEN_PLANS["WanTransformer3DModel"]
    failing: dict[str, Callable[[], Any]] = {
        "no plan": lambda: token_plan(nn.Linear(1, 1)),
        "no module": lambda: parallel(replace(wan_plan, output="no_such_module")),
        "no argument": lambda: parallel(
            replace(wan_plan, inputs={"blocks.*": {"image": Tokens(1)}})
        ),
        "groups": lambda: parallel(ring=of_groups["group"], ulysses=of_groups["group"]),
        "twice": twice,
        "mask": lambda: attend(attn_mask=lambda q: torch.ones(q.shape[2], q.shape[2]).bool()),
        "causal": lambda: attend(is_causal=True),
        "other keys": lambda: attend(key=lambda q: q[:, :, :5], value=lambda q: q[:, :, :5]),
        "unsplit": unsplit,
        "other attention": under_other_attention,
    }
    found = {}
    for name, function in failing.items():
        try:
            function()
            found[name] = "no error"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


# ----------------------------------------------------------------------------
# All of it

TWO_RANKS = {
    Layout(ulysses=2): [
        Case("wan", 4, sharded=True),
        Case("cosmos", 3),
        Case("cosmos1", 4),
        Case("sd3", 3),
        Case("flux", 4),
    ],
    Layout(ring=2): [
        Case("wan", 3),
        Case("cosmos", 4),
        Case("sd3", 4, sharded=True),
        Case("flux", 3),
    ],
    Layout(data=2): [Case("wan", 4)],
}
FOUR_RANKS = {
    Layout(ring=2, ulysses=2): [
        Case(kind, heads, sharded=heads == 4) for kind in KINDS for heads in (3, 4)
    ],
    Layout(ring=4): [Case("wan", 3), Case("sd3", 4, sharded=True)],
    Layout(data=2, ulysses=2): [Case("wan", 4, sharded=True), Case("sd3", 3)],
}


def on_two_ranks(rank: int) -> dict[str, Any]:
    ulysses, ring = Layout(ulysses=2).mesh(), Layout(ring=2).mesh()
    return {
        **outcomes(TWO_RANKS, rank),
        "checkpoints": checkpoint_outcomes(ulysses),
        "times": time_outcomes(ring),
        "messages": {
            "ulysses": messages(ulysses),
            "ring": messages(ring),
            "alone": messages(Layout(data=2).mesh()),
        },
        "errors": errors(ulysses),
    }


def on_four_ranks(rank: int) -> dict[str, Any]:
    return outcomes(FOUR_RANKS, rank)
