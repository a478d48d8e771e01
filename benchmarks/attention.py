"""Speed and peak memory of attention.

    python benchmarks/attention.py [--sizes 1024 4096] [--repeats 5] [--out FOLDER]

With a GPU this runs attention_on_gpu.py: forward, forward+tangent and both backwards in bfloat16,
for the head dims of --head-dims. Without a GPU it times forward+tangent in float32 on the CPU and
writes attention-cpu.json and attention-cpu.png.

The contenders run in turn, so that a slowdown of the computer affects all of them; times are
medians. The work is counted as 12·B·H·N²·d floating point operations for every contender. A matrix
product of the same dtype is timed in between as a reference. Peak memory is measured in a fresh
process, beyond the inputs.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention_on_gpu
import torch
import torch.nn.functional as F
from environment import environment
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import jvp_attn

BATCH, HEADS, HEAD_DIM = 1, 8, 64
SIZES = (1024, 2048, 4096, 8192)
MATMUL = 4096

Tensors = tuple[Tensor, Tensor, Tensor]


def ours(primals: Tensors, tangents: Tensors) -> Any:
    return torch.func.jvp(jvp_attn.flash_attn_jvp, primals, tangents)


def torch_math(primals: Tensors, tangents: Tensors) -> Any:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(attention, primals, tangents)


CONTENDERS: dict[str, Callable[[Tensors, Tensors], Any]] = {
    "jvp_attn": ours,
    "torch SDPA (MATH)": torch_math,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", help="sequence lengths")
    parser.add_argument("--head-dims", type=int, nargs="+", help="on a GPU")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each contender")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--memory-of", nargs=2, metavar=("NAME", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        name, size = options.memory_of
        print(peak_memory_here(CONTENDERS[name], int(size)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():
        attention_on_gpu.run(
            options.sizes or attention_on_gpu.SIZES,
            options.head_dims or attention_on_gpu.HEAD_DIMS,
            options.repeats,
            options.out,
        )
        return
    if options.head_dims:
        parser.error(f"--head-dims needs a GPU; on a CPU the head dim is {HEAD_DIM}")

    result: dict[str, Any] = {
        **environment(),
        "batch": BATCH,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
        "matmul": MATMUL,
        "repeats": options.repeats,
        "rows": [],
    }
    print(
        f"{result['device']}, {result['threads']} threads, float32, B{BATCH} H{HEADS} d{HEAD_DIM}"
    )
    peak: dict[str, float] = {}
    for size in sorted(options.sizes or SIZES):
        peak, missing = measure_memory(size, peak)
        result["rows"].append(row := measure_speed(size, options.repeats, peak))
        print_row(row, missing)
    path = options.out / "attention-cpu.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    plot(result, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png').name}")


# ----------------------------------------------------------------------------
# Measuring


def measure_speed(size: int, repeats: int, contenders: dict[str, float]) -> dict[str, Any]:
    """Time the contenders and the matrix product in turn; the first round is a warm-up."""
    primals, tangents = inputs(size)
    matrix = torch.randn(MATMUL, MATMUL)
    samples: dict[str, list[float]] = {name: [] for name in (*contenders, "matmul")}
    for _ in range(repeats + 1):
        for name in contenders:
            samples[name].append(seconds(lambda c=CONTENDERS[name]: c(primals, tangents)))
        samples["matmul"].append(seconds(lambda: matrix @ matrix))
    work = 12 * BATCH * HEADS * size**2 * HEAD_DIM
    median = {name: statistics.median(times[1:]) for name, times in samples.items()}
    return {
        "seqlen": size,
        "seconds": {name: times[1:] for name, times in samples.items()},
        "gflops": {name: work / median[name] / 1e9 for name in contenders}
        | {"matmul": 2 * MATMUL**3 / median["matmul"] / 1e9},
        "peak_bytes": contenders,
    }


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        call()
    return time.perf_counter() - start


def measure_memory(size: int, smaller: dict[str, float]) -> tuple[dict[str, float], dict[str, str]]:
    """Peak bytes of each contender in a process of its own, and why others are left out."""
    peak, missing = {}, {}
    for name in CONTENDERS:
        if smaller and name not in smaller:
            missing[name] = "left out, as at the smaller size"
            continue
        command = [sys.executable, __file__, "--memory-of", name, str(size)]
        child = subprocess.run(command, capture_output=True, text=True)
        if child.returncode == 0:
            peak[name] = float(child.stdout)
        else:
            last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
            missing[name] = f"left out: {last}"
    return peak, missing


def peak_memory_here(contender: Callable[[Tensors, Tensors], Any], size: int) -> float:
    """Peak bytes of one call beyond its inputs, results included."""
    contender(*inputs(64))  # libraries and thread pools
    arguments = inputs(size)
    # With this limit a call that does not fit fails here; otherwise Linux may kill any process.
    available = int(proc_bytes("/proc/meminfo", "MemAvailable"))
    resource.setrlimit(resource.RLIMIT_DATA, (available, available))
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = proc_bytes("/proc/self/status", "VmRSS")
    contender(*arguments)
    return proc_bytes("/proc/self/status", "VmHWM") - before


def proc_bytes(file: str, field: str) -> float:
    """The value of a field of a file in /proc, in bytes."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * float(line.split()[1])
    raise RuntimeError(f"{file} has no {field}")


def inputs(size: int) -> tuple[Tensors, Tensors]:
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, size, HEADS, HEAD_DIM)
    q, k, v, tq, tk, tv = (torch.randn(shape, generator=generator) for _ in range(6))
    return (q, k, v), (tq, tk, tv)


# ----------------------------------------------------------------------------
# Output


def print_row(row: dict[str, Any], missing: dict[str, str]) -> None:
    print(f"\nN = {row['seqlen']}: matmul {row['gflops']['matmul']:.0f} GFLOP/s")
    for name, peak in row["peak_bytes"].items():
        rate, matmul = row["gflops"][name], row["gflops"]["matmul"]
        times = statistics.median(row["seconds"][name])
        print(
            f"  {name:18s} {1e3 * times:9.1f} ms {rate:7.1f} GFLOP/s = {rate / matmul:4.0%} of "
            f"matmul, peak {peak / 2**20:8.1f} MiB"
        )
    for name, reason in missing.items():
        print(f"  {name:18s} {reason}")
    if len(row["peak_bytes"]) == len(CONTENDERS):
        (a, b), (p, q) = (list(row[key].values())[:2] for key in ("gflops", "peak_bytes"))
        print(f"  {a / b:.1f} times as fast, 1/{q / p:.0f} of the memory")


def plot(result: dict[str, Any], path: Path) -> None:
    """Rates and peak memory over the sequence length."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for name, colour in zip(CONTENDERS, ("#1f6fb4", "#c8553d"), strict=True):
        having = [row for row in rows if name in row["peak_bytes"]]
        sizes = [row["seqlen"] for row in having]
        style = {"color": colour, "marker": "o", "label": name}
        speed.plot(sizes, [row["gflops"][name] for row in having], **style)
        memory.plot(sizes, [row["peak_bytes"][name] / 2**20 for row in having], **style)

    matmul = statistics.median(row["gflops"]["matmul"] for row in rows)
    speed.axhline(matmul, color="grey", linestyle="--", label=f"matmul, {MATMUL}³")
    speed.set_ylim(0, 1.45 * matmul)
    speed.set_title("GFLOP/s", loc="left", fontsize=10)
    memory.set_yscale("log", base=2)
    memory.yaxis.set_major_formatter(
        lambda mib, _: f"{mib:g} MiB" if mib < 1024 else f"{mib / 1024:g} GiB"
    )
    memory.set_title("peak extra memory", loc="left", fontsize=10)
    sizes = [row["seqlen"] for row in rows]
    for axis in (speed, memory):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_xlabel("sequence length")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="upper left")
    shape = f"float32, B{BATCH} H{HEADS} d{HEAD_DIM}"
    figure.suptitle(f"Attention forward + tangent, {shape}, {result['device']}", fontsize=11)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
