"""Speed and peak memory of attention on a GPU in bfloat16, run by benchmarks/attention.py.

Every problem has heads × head_dim = 2048 and batch × seqlen_q = 16384, or one longer sequence. A
sample times a queue of calls with CUDA events, so that launch overhead does not count. The
contenders and a matrix product run in turn. torch's MATH attention, whose memory is quadratic, is
left out from 8192 keys on.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, MATH, OPERATIONS, Attention, Call, Inputs, call_of
from environment import environment

SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
HEAD_DIMS = (64, 96, 128, 256)
MASKS = ("full", "causal", "cross")  # cross: cross-attention to 512 text tokens

HIDDEN_SIZE = 2048
TOKENS = 16384
TEXT_TOKENS = 512
MATMUL = 8192
DTYPE = torch.bfloat16
MATH_BELOW = 8192  # keys

# The duration of a sample in seconds, far above the resolution of CUDA events.
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Problem:
    """One point of the benchmark grid."""

    operation: str
    mask: str
    head_dim: int
    seqlen_q: int

    @property
    def seqlen_k(self) -> int:
        return TEXT_TOKENS if self.mask == "cross" else self.seqlen_q

    @property
    def batch(self) -> int:
        return max(TOKENS // self.seqlen_q, 1)

    @property
    def heads(self) -> int:
        return HIDDEN_SIZE // self.head_dim

    @property
    def work(self) -> float:
        """Floating point operations, the same for every contender."""
        scores = self.batch * self.heads * self.seqlen_q * self.seqlen_k
        return OPERATIONS[self.operation] * scores * self.head_dim / (1 + (self.mask == "causal"))

    def inputs(self, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def new(seqlen: int) -> torch.Tensor:
            shape = (self.batch, seqlen, self.heads, self.head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=DTYPE)

        q, k, v, tq, tk, tv = (new(x) for x in 2 * (self.seqlen_q, self.seqlen_k, self.seqlen_k))
        cotangents = (new(self.seqlen_q), new(self.seqlen_q))
        return Inputs((q, k, v), (tq, tk, tv), cotangents, self.mask == "causal")


def run(sizes: Sequence[int], head_dims: Sequence[int], repeats: int, folder: Path) -> None:
    """Measure the whole grid; write attention-cuda.json and a plot for each mask."""
    result: dict[str, Any] = {
        **environment(),
        "capability": torch.cuda.get_device_capability(),
        "cuda": torch.version.cuda,
        "dtype": str(DTYPE).removeprefix("torch."),
        "matmul": MATMUL,
        "repeats": repeats,
        "rows": [],
    }
    print(f"{result['device']}, {result['dtype']}")
    path = folder / "attention-cuda.json"
    for mask, head_dim, operation in product(MASKS, head_dims, OPERATIONS):
        for size in sorted(sizes):
            problem = Problem(operation, mask, head_dim, size)
            result["rows"].append(row := measure(problem, torch.device("cuda"), repeats))
            print_row(row)
            path.write_text(json.dumps(result, indent=2) + "\n")  # keep partial results
    print(f"\nwrote {path}")
    for mask in MASKS:
        picture = folder / f"attention-cuda-{mask}.png"
        plot([row for row in result["rows"] if row["mask"] == mask], result["device"], picture)
        print(f"wrote {picture}")


# ----------------------------------------------------------------------------
# Measuring


def measure(
    problem: Problem,
    device: torch.device,
    repeats: int,
    *,
    contenders: Mapping[str, tuple[Attention, tuple[str, ...]]] = CONTENDERS,
    matmul: int = MATMUL,
) -> dict[str, Any]:
    """Time every contender that supports the problem, and the matrix product, in turn.

    Args:
        problem, device: what is computed, and where. On a CPU there is no peak memory.
        repeats: how many samples of each.
        contenders: as `contenders.CONTENDERS`.
        matmul: the size of the matrices of the product.
    """
    inputs = problem.inputs(device)
    matrix = torch.randn(matmul, matmul, device=device, dtype=DTYPE)
    prepare: dict[str, Callable[[], Call]] = {"matmul": lambda: lambda: matrix @ matrix}
    counts = {"matmul": calls_of_a_sample(lambda: matrix @ matrix, device)}
    peak: dict[str, int] = {}
    missing: dict[str, str] = {}
    for name, (attention, operations) in contenders.items():
        if problem.operation not in operations:
            continue
        if name == MATH and problem.seqlen_k >= MATH_BELOW:
            missing[name] = f"its memory is quadratic; it is timed below {MATH_BELOW} keys"
            continue
        prepare_this = partial(call_of, problem.operation, attention, inputs)
        try:
            peak[name] = peak_memory(prepare_this(), device)
            counts[name] = calls_of_a_sample(prepare_this(), device)
            prepare[name] = prepare_this
        except Exception as error:  # leave the contender out, with the reason
            peak.pop(name, None)
            missing[name] = first_line(error)
            torch.cuda.empty_cache()

    samples: dict[str, list[float]] = {name: [] for name in prepare}
    for repeat in range(repeats):
        # In alternating order, so that none always follows the same other one.
        for name in list(prepare)[:: -1 if repeat % 2 else 1]:
            # Prepare a backward for its own sample only: its saved tensors may fill the memory.
            samples[name].append(seconds(prepare[name](), counts[name], device))

    median = {name: statistics.median(times) for name, times in samples.items()}
    work = dict.fromkeys(prepare, problem.work) | {"matmul": 2 * matmul**3}
    return {
        **asdict(problem),
        "seqlen_k": problem.seqlen_k,
        "batch": problem.batch,
        "heads": problem.heads,
        "seconds": samples,
        "tflops": {name: work[name] / median[name] / 1e12 for name in prepare},
        "peak_bytes": peak,
        "missing": missing,
    }


def seconds(call: Call, count: int, device: torch.device) -> float:
    """Seconds of one call, averaged over a queue of calls."""
    if device.type == "cpu":
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - begin) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def calls_of_a_sample(call: Call, device: torch.device) -> int:
    """The number of calls in a sample; timing them is also the warm-up."""
    seconds(call, 2, device)
    return max(1, round(SAMPLE_SECONDS / seconds(call, 2, device)))


def peak_memory(call: Call, device: torch.device) -> int:
    """Peak bytes of one call beyond the memory in use before it, results included; 0 on a CPU."""
    call()  # libraries and compilers
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


# ----------------------------------------------------------------------------
# Output


def print_row(row: dict[str, Any]) -> None:
    matmul = row["tflops"]["matmul"]
    print(
        f"\n{row['operation']}, {row['mask']}, d {row['head_dim']}, {row['batch']} x "
        f"{row['heads']} x {row['seqlen_q']} x {row['seqlen_k']}: matmul {matmul:.0f} TFLOP/s"
    )
    for name, peak in row["peak_bytes"].items():
        rate, time = row["tflops"][name], statistics.median(row["seconds"][name])
        print(
            f"  {name:22s} {1e3 * time:9.3f} ms {rate:7.1f} TFLOP/s = {rate / matmul:4.0%} of "
            f"matmul, peak {peak / 2**20:9.1f} MiB"
        )
    for name, reason in row["missing"].items():
        print(f"  {name:22s} left out: {reason}")


def plot(rows: list[dict[str, Any]], device: str, path: Path) -> None:
    """Rates over the sequence length, in a grid of operations (rows) × head dims (columns)."""
    from matplotlib.figure import Figure

    head_dims = sorted({row["head_dim"] for row in rows})
    figure = Figure(figsize=(3.4 * len(head_dims), 2.8 * len(OPERATIONS)), layout="constrained")
    panels = figure.subplots(len(OPERATIONS), len(head_dims), sharex=True, squeeze=False)
    ticks = sorted({row["seqlen_q"] for row in rows})
    colours = {name: f"C{i}" for i, name in enumerate(CONTENDERS)}
    for (i, operation), (j, head_dim) in product(enumerate(OPERATIONS), enumerate(head_dims)):
        panel = panels[i, j]
        here = [x for x in rows if (x["operation"], x["head_dim"]) == (operation, head_dim)]
        for name, sizes, rates in lines(here):
            panel.plot(sizes, rates, marker="o", markersize=3, color=colours[name], label=name)
        matmul = statistics.median(row["tflops"]["matmul"] for row in here)
        panel.axhline(matmul, color="grey", linestyle="--", label=f"matmul, {MATMUL}³")
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [f"{x // 1024}k" if x % 1024 == 0 else str(x) for x in ticks])
        panel.set_ylim(0)
        panel.set_title(f"{operation}, d {head_dim}", loc="left", fontsize=9)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    handles = {
        label: handle
        for panel in panels.flat
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    mask = {"cross": f"{TEXT_TOKENS} keys"}.get(rows[0]["mask"], rows[0]["mask"])
    figure.suptitle(f"TFLOP/s over the sequence length, {mask}, bfloat16, {device}", fontsize=11)
    figure.savefig(path, dpi=120)


def lines(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[int], list[float]]]:
    """Each contender with results, its sequence lengths and rates."""
    for name in CONTENDERS:
        having = [row for row in rows if name in row["peak_bytes"]]
        if having:
            yield name, [x["seqlen_q"] for x in having], [x["tflops"][name] for x in having]
