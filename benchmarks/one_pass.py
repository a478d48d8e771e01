"""One pass of the student against two: FLOPs, peak memory, seconds, all-gathers, errors.

    python benchmarks/one_pass.py [--repeats 7] [--out FOLDER]

The student is a WanTransformer3DModel of diffusers with random weights; a step is rCM's consistency
loss and its gradients. "two passes" is a JVP without gradients and a forward pass with them, whose
blocks keep their activations or use torch.utils.checkpoint. "one pass" is checkpoint_primal around
each block; "one pass, compiled" also compiles the blocks of student and teacher (compile_blocks).
All-gathers and reduce-scatters are those of FSDP2 for each block on two gloo ranks. FLOPs, memory
and collectives are counted in uncompiled blocks only. Takes minutes. Writes one_pass.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from environment import environment
from live_bytes import PeakBytes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from jvp_attn import checkpoint_primal, replace_sdpa
from rcm.distributed.processes import destroy_group
from rcm.losses import Loss, consistency_loss, exact_jvp, one_pass_jvp
from rcm.models.compiled_blocks import compile_blocks
from rcm.network_conversions import from_rectified_flow
from rcm.trigflow import Network

LAYERS, HEADS, HEAD_DIM = 6, 4, 32
BATCH, LATENT, TEXT = 2, (4, 3, 16, 16), (8, 32)  # 192 tokens
RANKS = 2

# Each variant: the derivative, and how blocks are checkpointed.
VARIANTS: dict[str, tuple[Any, Callable[[nn.Module], None]]] = {
    "two passes": (exact_jvp, lambda model: None),
    "two passes, checkpoint": (exact_jvp, lambda model: model.enable_gradient_checkpointing()),
    "one pass": (
        one_pass_jvp,
        lambda model: model.enable_gradient_checkpointing(checkpoint_primal),
    ),
}
COMPILED = "one pass, compiled"
VARIANTS[COMPILED] = VARIANTS["one pass"]
COUNTED = [name for name in VARIANTS if name != COMPILED]
REFERENCE = "two passes, checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)

    results = {name: {} if name == COMPILED else costs(name) for name in VARIANTS}
    for name, seconds in times(options.repeats).items():
        results[name]["seconds"] = seconds
    for name, calls in collectives().items():
        results[name] |= calls
    exact = outcome("two passes")
    for name, result in results.items():
        result["seconds_ratio"] = round(
            statistics.median(result["seconds"]) / statistics.median(results[REFERENCE]["seconds"]),
            3,
        )
        result |= errors(outcome(name), exact)
    size = {"layers": LAYERS, "heads": HEADS, "head_dim": HEAD_DIM, "batch": BATCH}
    report = {
        **environment(),
        "diffusers": diffusers.__version__,
        "size": {**size, "latent": LATENT, "text": TEXT, "dtype": "float32"},
        "forward_flops": forward_flops(),
        "variants": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "one_pass.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(results, indent=2))


# ---- the step ----------------------------------------------------------------------------------


def build(seed: int) -> nn.Module:
    """A small Wan whose weights are all random."""
    torch.manual_seed(seed)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        text_dim=TEXT[1],
        freq_dim=32,
        ffn_dim=4 * HEADS * HEAD_DIM,
        num_layers=LAYERS,
        rope_max_seq_len=64,
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


def network(model: nn.Module) -> Network:
    def raw(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return model(x, t, text, return_dict=False)[0]

    return from_rectified_flow(raw, time_scale=1000.0)


def step(name: str, student: nn.Module, teacher: nn.Module, batch: slice = slice(None)) -> Loss:
    """The loss of a batch, after its backward pass."""
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, BATCH, *LATENT, generator=generator)[:, batch]
    text = torch.randn(BATCH, *TEXT, generator=generator)[batch]
    t = torch.linspace(0.3, 1.4, BATCH, dtype=torch.float64)[batch]
    with replace_sdpa():
        loss = consistency_loss(
            network(student),
            x0,
            noise,
            t,
            text,
            teacher=network(teacher),
            form="rcm",
            tangent_norm="l2",
            derivative=VARIANTS[name][0],
        )
        loss.value.mean().backward()
    return loss


def student_and_teacher(name: str) -> tuple[nn.Module, nn.Module]:
    student, teacher = build(0), build(1).requires_grad_(False)
    VARIANTS[name][1](student)
    if name == COMPILED:
        compile_blocks([*student.blocks, *teacher.blocks])
    return student, teacher


# ---- measurements ------------------------------------------------------------------------------


def costs(name: str) -> dict[str, Any]:
    """FLOPs of matrix products, without attention, and the peak of live bytes besides weights."""
    student, teacher = student_and_teacher(name)
    with FlopCounterMode(display=False) as flops:
        step(name, student, teacher)
    student.zero_grad()
    with PeakBytes([*student.parameters(), *teacher.parameters()]) as memory:
        step(name, student, teacher)
    return {"flops": flops.get_total_flops(), "peak_bytes": memory.peak}


def forward_flops() -> int:
    """Of one forward pass of the student."""
    model = build(0)
    with torch.no_grad(), replace_sdpa(), FlopCounterMode(display=False) as flops:
        model(torch.randn(BATCH, *LATENT), torch.ones(BATCH), torch.randn(BATCH, *TEXT))
    return flops.get_total_flops()


def times(repeats: int) -> dict[str, list[float]]:
    """Seconds of CPU time of each step; the variants alternate."""
    networks = {name: student_and_teacher(name) for name in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(repeats + 1):
        for name, (student, teacher) in networks.items():
            student.zero_grad()
            start = time.process_time()
            step(name, student, teacher)
            if repeat:
                seconds[name].append(round(time.process_time() - start, 4))
    return seconds


def outcome(name: str) -> dict[str, Tensor]:
    student, teacher = student_and_teacher(name)
    loss = step(name, student, teacher)
    gradients = {key: p.grad for key, p in student.named_parameters() if p.grad is not None}
    return {"jvp_norm": loss.diagnostics["jvp_norm"], **gradients}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of ‖D‖, and the largest of the gradients of all parameters."""
    relative = {name: float((found[name] - y).norm() / y.norm()) for name, y in exact.items()}
    return {"jvp_norm_error": relative.pop("jvp_norm"), "gradient_error": max(relative.values())}


# ---- two ranks ---------------------------------------------------------------------------------


def collectives() -> dict[str, dict[str, Any]]:
    """Collectives of a step on each rank, and the error of the gradients to one process."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder,), nprocs=RANKS)
        return json.loads((Path(folder) / "0.json").read_text())


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    counts = {}
    for name in COUNTED:
        student, teacher = student_and_teacher(name)
        for model in (student, teacher):
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        for _ in range(2):  # the first step initialises FSDP2
            student.zero_grad()
            with Collectives() as collectives:
                step(name, student, teacher, slice(rank, rank + 1))
        found = {key: p.grad for key, p in student.named_parameters() if p.grad is not None}
        gradients = {k: g.full_tensor() if isinstance(g, DTensor) else g for k, g in found.items()}
        alone = outcome("two passes")
        worst = max(float((g - alone[k]).norm() / alone[k].norm()) for k, g in gradients.items())
        counts[name] = {
            "all_gathers": collectives.calls["allgather"],
            "reduce_scatters": collectives.calls["reduce_scatter"],
            "gradient_error_on_ranks": worst,
        }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(counts))
    destroy_group()


class Collectives(TorchDispatchMode):
    """Counts the collectives inside a block by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for kind in ("allgather", "reduce_scatter"):
            self.calls[kind] += func.name().startswith(("c10d::" + kind, "c10d::_" + kind))
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
